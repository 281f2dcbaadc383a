"""NVLink SHARP: collectives in which the switch adds and multicasts, one file a collective as in `collectives`."""
