"""Computed sentences that stand on top of a page or notebook."""

import html

import pandas as pd

from lmlib.text import printable


class Verdict(str):
    """A sentence, plain in a terminal and bold in a notebook."""

    def _repr_html_(self) -> str:
        return (f"<p style='font-size: 1.2em; max-width: 52em'><b>{html.escape(printable(self))}"
                "</b></p>")

    def _repr_pretty_(self, printer, cycle: bool):  # IPython would show the quotes of a str
        printer.text(printable(self))


def of_models(ranks: pd.DataFrame, pairs: pd.DataFrame) -> Verdict:
    """Say which models are worse than others, from the tables of `ranking`."""
    if ranks.empty:
        return Verdict("No run is finished yet.")
    table, found = pairs.reset_index(), []
    others = table["minus"].nunique()
    for model, lost in table[table["verdict"] == "worse"].groupby("model", sort=False):
        other = lost["minus"].iloc[0] if others == 1 else f"{len(lost)} of {others} other models"
        found.append(f"{model} is worse than {other}")
    counts = table["verdict"].value_counts().to_dict()
    noise, worse = counts.pop("within the noise", 0), counts.pop("worse", 0)
    if noise:
        found.append("all other differences are within the noise" if worse else
                     f"No model is worse than another: all {noise} differences between "
                     f"{others + 1} models are within the noise" if noise > 1 else
                     "The difference between the two models is within the noise")
    found += [f"{n} difference{'s' * (n > 1)} without a verdict ({why})"
              for why, n in counts.items()]
    compared = {*table["model"], *table["minus"]}
    left_out = [f"{model} ({row['verdict']})" if row["verdict"] != "best" else model
                for model, row in ranks.iterrows() if model not in compared]
    said = "not compared" if found else "There is nothing to compare"
    found += [f"{said}: {', '.join(left_out)}"] if left_out else []
    return Verdict("; ".join(found) + ".")
