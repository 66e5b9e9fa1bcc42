"""`analyze`: spectra, representations, loss landscapes and forgetting."""
