"""Extension of griffe, which reads the API: the imports of a package for type checkers are its public names.

`randlora_pl.utils.quick_imports.lazy_exports` makes them so at run time.
"""

from griffe import Extension, Module


class LazyExports(Extension):
    """Set the exports of packages that have no ``__all__``."""

    def on_module_members(self, *, mod: Module, **_: object) -> None:
        """Read the imports of a loaded package."""
        if mod.is_init_module and mod.exports is None:
            mod.exports = [name for name, each in mod.members.items() if each.is_alias and not each.runtime]
