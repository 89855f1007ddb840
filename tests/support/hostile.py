"""Parameter files and texts that try to run code, and checks that they run nothing."""

import contextlib
import html.parser
import json
from pathlib import Path
from typing import Any

import nbformat

from lmlib import audit
from lmlib.analysis import audit_page, figures, frames, ranking, render, tables
from lmlib.config import RunConfig
from lmlib.notebook import token_html
from lmlib.text import printable

# ---------------------------------------------------------------------------------------------
# Parameter files: each must be a ValueError, and none may create the file CANARY

CANARY = "owned_by_a_parameter_file"
_CODE = f"__import__('pathlib').Path('{CANARY}').touch()"

PARAMETER_FILES = {
    "key that is code": f"{_CODE}: 1",
    "key with a line break": f'"total_steps\\n{_CODE}\\nx": 1',
    "key with a carriage return": f'"total_steps\\r{_CODE}": 1',
    "key with a semicolon": f'"seed = 1; {_CODE}; x": 1',
    "key with a space": '"total steps": 5',
    "key that is a call": '"print(1)": 1',
    "key with letters that look alike": '"ѕeed": 1',
    "key that is empty": '"": 1',
    "key that is a number": "1: 2",
    "key that is null": "~: 2",
    "key that is a list": "? [a]\n: 1",
    "key given twice": "seed: 1\nseed: 2",
    "key that is a Python builtin": "__builtins__: 1",
    "key that is a keyword": "class: 1",
    "merge key": "base: &b {seed: 1}\n<<: *b",
    "tag that builds an object": f'seed: !!python/object/apply:os.system ["touch {CANARY}"]',
    "tag that makes an object": "seed: !!python/object/new:os.system ['true']",
    "tag that names a function": "seed: !!python/name:os.system",
    "tag that imports a module": "seed: !!python/module:os",
    "custom tag": "seed: !custom 1",
    "binary value": "corpus: !!binary aGVsbG8=",
    "value that is a list": "corpus: [a, b]",
    "value that is a mapping": "corpus: {a: b}",
    "value that is a date": "run_name: 2026-01-01",
    "value that is a set": "corpus: !!set {a, b}",
    "value with several lines": f"corpus: |\n  a\n  {_CODE}",
    "value that closes a string": f'corpus: "x\\"\\n{_CODE}\\n\\""',
    "value with an escape sequence": 'corpus: "\\e[2J"',
    "value with a null character": 'corpus: "a\\0b"',
    "value that reverses the writing direction": 'corpus: "a\\u202Eb"',
    "name that leaves the output folder": "run_name: ../../escaped",
    "name that is absolute": "run_name: /tmp/escaped",
    "name that is hidden": "run_name: .ssh",
    "number that is not finite": "learning_rate: .nan",
    "number with 5,000 digits": f"total_steps: {'9' * 5000}",
    "list at the top": "- a\n- b",
    "text at the top": "just text",
    "empty file": "",
    "anchors that grow exponentially": "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nseed: [*c, *c]",
    "anchor that contains itself": "a: &a [*a]",
    "nesting 5,000 levels deep": "seed: " + "[" * 5000,
    "two documents": "seed: 1\n---\nseed: 2",
    "bytes that are not UTF-8": b"seed: \xff\xfe\x00",
    "parameter that does not exist": "os_system: 1",
    "boolean given as text": "deterministic: 'false'",
}


def refused(name: str, folder: Path) -> bool:
    """Check that a parameter file raises one short ValueError and runs nothing."""
    file, content = folder / "hostile.yaml", PARAMETER_FILES[name]
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with contextlib.chdir(folder):
        try:
            RunConfig.load(file)
            return False
        except ValueError as error:
            return len(str(error)) < 1000 and not (folder / CANARY).exists()


# ---------------------------------------------------------------------------------------------
# Texts: wherever they are shown, they must stay text. If text N runs as script, it calls owned(N).

TEXTS = [
    "<script>owned(0)</script>",
    "<img src=x onerror=owned(1)>",
    "</script><svg onload=owned(2)>",
    "\"><iframe srcdoc='<script>parent.owned(3)</script>'>",
    "[x](javascript:owned(4)) <a href='javascript:owned(4)' autofocus onfocus=owned(4)>x</a>",
    "</pre></div></td></table><script>owned(5)</script>",
    "' onmouseover='owned(6)",
    '" onmouseover="owned(7)',
    "<details open ontoggle=owned(8)>x</details>",
    "<style>@import 'javascript:owned(9)'; * { display: none }</style>",
    "<base href='http://example.invalid/'>",
    "<meta http-equiv=refresh content='0;url=javascript:owned(11)'>",
    "<math><mtext></p><img src=x onerror=owned(12)></mtext></math>",
    "<!--><img src=x onerror=owned(13)>-->",
    "<![CDATA[<img src=x onerror=owned(14)>]]>",
    "&lt;script&gt;owned(15)&lt;/script&gt;",
    "&#60;img src=x onerror=owned(16)&#62;",
    "$\\href{javascript:owned(17)}{x}$ \\(\\unicode{<img src=x onerror=owned(17)>}\\)",
    "{{ constructor.constructor('owned(18)')() }} {% raw %} ${owned(18)}",
    "<b><i>bold</i></b><marquee onstart=owned(19)>",
    "\x1b]8;;javascript:owned(20)\x07link\x1b]8;;\x07\x1b[2J",
    "\u202egnp.exe\u202c <IMG SRC=x ONERROR=owned(21)>",
    "<scr\x00ipt>owned(22)</scr\x00ipt>",
    "%3Cscript%3Eowned(23)%3C/script%3E ＜script＞owned(23)＜/script＞",
    "%{x}<br>%{customdata[0]}<extra><a href='javascript:owned(24)'>x</a></extra>",
]


class _Structure(html.parser.HTMLParser):
    """The tags of a page, their attributes' names, and its comments: what text may not change."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, sorted(name for name, _ in attributes)))

    def handle_endtag(self, tag):
        self.found.append(("/" + tag,))

    def handle_comment(self, content):
        self.found.append(("comment",))


def hostile_run(text: str, folder: Path) -> Path:
    """Create a run's folder with the text in every place: names, kinds of records, keys, values."""
    name = text.replace("/", "\u2215").replace("\0", "")[:80]
    scores = {"val_loss": 6.0, "val_loss_stderr": 0.1, "val_accuracy": 0.1}
    scores |= {"val_perplexity": 400.0, "val_bits_per_byte": 3.0}
    losses, accuracies = [6.0, 5.0], [0.1, text]
    records = [
        {"kind": "eval", "step": 0, **scores, "note": text, text: text, "timing": {"seconds": 1.0}},
        {
            "kind": "step",
            "step": 1,
            "loss": 6.0,
            "learning_rate": text,
            "grad_norm": 1.0,
            "timing": {"tokens_per_second": 9.0},
        },
        {"kind": text, "step": 2, "timing": {text: text}},
        {"kind": "sample", "step": 2, "prompts": [text], "texts": [text], "timing": {}},
        {
            "kind": "profile",
            "step": 2,
            "val_loss_by_position": losses,
            "val_accuracy_by_position": accuracies,
            "timing": {},
        },
        {
            "kind": "step",
            "step": 3,
            "loss": 5.0,
            "expert_load": [[0.5, 0.5]],
            "timing": {"seconds": 2.0},
        },
    ]
    run_dir = folder / name
    run_dir.mkdir(parents=True, exist_ok=True)
    config = {"run_name": text, "corpus": text, text: text, "total_steps": 3}
    (run_dir / "config.json").write_text(json.dumps(config))
    (run_dir / "results.json").write_text("{}")
    lines = [json.dumps(record) + "\n" for record in records]
    (run_dir / "metrics.jsonl").write_text("".join(lines))
    return run_dir


def charts(frame: Any, run_dir: Path) -> dict[str, Any]:
    """Return every figure of a run."""
    return {
        "curves": figures.training_curves(frame),
        "positions": figures.loss_by_position(frame),
        "cost": figures.cost(frames.results_table([run_dir])),
        "experts": figures.expert_load(frame),
        "audit": audit_page.figure([]),
        "held-out scores": audit_page.scores(dict.fromkeys(frame.attrs["runs"], frame)),
        "losses": ranking.losses([run_dir]),
        "mean curves": ranking.curves([run_dir]),
    }


def pages(text: str, run_dir: Path, exporter: Any) -> dict[str, str]:
    """Return all HTML that shows a run or a text: tables, figures, an exported notebook."""
    frame = frames.read_runs(run_dir)
    html_output = {"text/html": frame.to_html(), "text/plain": printable(text)}
    outputs = [
        nbformat.v4.new_output("stream", text=printable(text)),
        nbformat.v4.new_output("execute_result", data=html_output),
    ]
    cell = nbformat.v4.new_code_cell("show()", outputs=outputs)
    parameters = frames.parameters_table([run_dir], differences_only=False)
    token = token_html.Token(text, 0.5, 1, [(text, 0.5)])
    return {
        "records": frame.to_html(),
        "scores": frames.results_table([run_dir]).to_html(),
        "parameters": parameters.to_html(),
        "ranking": ranking.ranking([run_dir]).to_html(),
        "card": tables.results(run_dir).html,
        "formatted parameters": tables.formatted(parameters, text).html,
        "texts": token_html.cards(frames.samples_at(frame)),
        **{
            name: figure.to_html(include_plotlyjs=False, div_id="x")
            for name, figure in charts(frame, run_dir).items()
        },
        "exported notebook": exporter.from_notebook_node(nbformat.v4.new_notebook(cells=[cell]))[0],
        "audit's verdicts": audit_page.table([audit.Report("split", False, text)], text),
        "tokens": token_html.shade(text, [token]),
        "difference": token_html.shade_difference(text, [token], [token], (text, text)),
        "side by side": token_html.cards([(text, text, text)]),
        "grid": token_html.grid([text], [(text, [text])]),
    }


def stay_text(texts: list[str], folder: Path) -> list[bool]:
    """Check that texts stay text, one result per text.

    Every page must have the same tags and attributes as with a harmless text, and the text's form
    for terminals and charts must have no control characters and no tags.
    """
    import nbconvert

    exporter, results = nbconvert.HTMLExporter(), []
    harmless = hostile_run("plain", folder)

    def structures(text: str, run_dir: Path) -> dict[str, list]:
        found = pages(text, run_dir, exporter)
        return {name: _Structure(page).found for name, page in found.items()}

    expected = structures("plain", harmless)
    for text in texts:
        run_dir = hostile_run(text, folder)
        figures_of_both = charts(frames.read_runs([run_dir, harmless]), run_dir).values()
        results.append(
            structures(text, run_dir) == expected
            and not any(c in printable(text) for c in "\x1b\x07\x00\u202e")
            and not any("<" in trace.name for figure in figures_of_both for trace in figure.data)
            and all(render.png(figure).startswith(b"\x89PNG") for figure in figures_of_both)
        )
    return results
