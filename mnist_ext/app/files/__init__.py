"""Files and folders that are whole, locked, or taken back, whatever happens to the process."""
