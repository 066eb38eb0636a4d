"""x"""


class Flax:
    name = "flax"
    suffixes = (".msgpack",)

    def matches(self, head, path):
        return False

    def read(self, path): ...
    def pieces(self, file): ...
