"""Progress, logs, figures and tables of predictions that a run prints and writes."""
