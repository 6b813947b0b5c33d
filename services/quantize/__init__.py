"""`xds quantize`: a checkpoint in INT8, calibrated on text (paper section 4.5)."""
