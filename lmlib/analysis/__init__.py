"""What runs say: tables, figures, comparisons, forecasts. Needs pandas and plotly."""

from lmlib.analysis.forecasting import forecast as forecast
