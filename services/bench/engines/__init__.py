"""One file per engine; each is a process of its own (`serve`), so that libraries and threads do not meet."""
