"""An adapter is written in the form that the place reads where it will be served."""
