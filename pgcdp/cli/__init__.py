"""The command line: one file per verb (arguments, one call of `pgcdp.api`, output), and what they share.

`main` runs a command and turns errors into exit codes, `options` holds what several commands take, `screen` is the
only place that writes to the terminal. Verbs import `pgcdp.api` inside their function, so that `--help` is quick.
"""
