"""The authors' checkpoint to a folder, and a folder to the Hub."""
