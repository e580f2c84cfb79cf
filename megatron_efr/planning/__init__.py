"""`efr plan`: what a run will take in memory and time, said before anything is downloaded or asked
for.
"""
