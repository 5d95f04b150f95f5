"""Tables of results, filled from recorded test runs."""
