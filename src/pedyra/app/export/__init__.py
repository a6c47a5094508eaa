"""An adapter for other readers, merged weights, and how either is served; what the Hub says."""
