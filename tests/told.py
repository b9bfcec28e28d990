"""A reporter that remembers what it was told: stands in for the command line's console."""


class Told:
    """`counts` holds the (done, total) of every counter by its name, `said` the sentences."""

    def __init__(self):
        self.counts, self.said = {}, []

    def counter(self, what):
        return lambda *call: self.counts.setdefault(what, []).append(call)

    def say(self, sentence):
        self.said.append(sentence)
