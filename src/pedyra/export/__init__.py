"""An adapter in the form of the place where it will be served: what each takes, and how it is written."""
