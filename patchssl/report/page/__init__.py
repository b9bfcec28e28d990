"""The HTML page of records, runs and figures."""
