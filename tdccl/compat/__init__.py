"""Other libraries' interfaces, on tdccl."""
