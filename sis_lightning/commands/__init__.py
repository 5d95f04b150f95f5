"""The command line: one module per command, each with its parser and its `main(arguments)`.

Modules of commands import nothing heavy at their top, so that `--help` and mistyped options are answered at once.
"""
