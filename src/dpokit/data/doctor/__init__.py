"""`dpokit data check`: what a dataset would teach a model besides the preference, and what is wrong with its rows."""
