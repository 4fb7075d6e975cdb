"""What runs and experiments have found, as pages to read and to print."""
