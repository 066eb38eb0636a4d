"""What the demos of all frameworks share: the story, the kill, the comparison and the table. Imports no framework.

An adapter adds what trains and how it is saved, as a `Trainee`, and names the module that runs it in a `Framework`.
"""
