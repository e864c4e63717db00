"""The Store interface for other processes of the machine, through the process that owns the drive."""
