class Adapters:
    pass
