"""How the demo model was made: corpus -> tokenizer -> model -> train -> verify.

Only this package needs torch; serving the model does not. `python -m services.demo.train.train --help`
starts it.
"""
