"""What is installed here, what is missing, and for what: the findings behind `miles doctor` and `miles plugins doctor`.

Each check stands alone: one that crashes is itself a finding, and nothing here needs torch or transformers to work.
What imports them (`miles.diagnosis.probe`) runs in a process of its own, so that a library that crashes or hangs when
it is imported is one line of the report.
"""
