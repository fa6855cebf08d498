"""The papers' experiments as plans of runs: one folder a run, finished ones are not run again."""
