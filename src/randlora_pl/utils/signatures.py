"""Signatures of constructors that pass ``**options`` on to their bases."""

import inspect


def whole_signature(kind: type) -> inspect.Signature:
    """Return the signature of a class, with the options that its constructor passes on to its bases.

    Options named in the class attribute ``fixed_options`` are left out: the constructor sets them itself.
    """
    found: dict[str, inspect.Parameter] = {}
    for each in kind.__mro__:
        if "__init__" not in vars(each):
            continue
        _, *own = inspect.signature(vars(each)["__init__"]).parameters.values()
        for option in own:
            if option.name not in getattr(kind, "fixed_options", ()) and option.kind is not option.VAR_KEYWORD:
                found.setdefault(option.name, option)
        if not any(option.kind is option.VAR_KEYWORD for option in own):
            break
    return inspect.Signature(sorted(found.values(), key=lambda option: option.kind))
