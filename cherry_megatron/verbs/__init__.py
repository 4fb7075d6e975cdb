"""The command line of each verb: its options, and the function that it calls."""
