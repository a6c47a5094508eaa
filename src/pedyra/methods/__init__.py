"""Each fine-tuning method has a file here."""
