"""`xds bench model`: one checkpoint in several engines, side by side."""
