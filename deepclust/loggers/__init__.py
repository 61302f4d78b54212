"""Where metrics, tables and messages of a run go."""
