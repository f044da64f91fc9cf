"""Committed outputs are for readers. `nbdev-clean` removes execution counts, and nbval refuses outputs without them."""


def pytest_collection_modifyitems(items):
    for item in items:
        if hasattr(item, "cell"):
            item.cell.outputs = []
