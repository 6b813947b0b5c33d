"""One file per transport. `open_pairs` makes links for the ping-pong, `open_rows` ways for the collectives."""
