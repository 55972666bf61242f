"""How many examples a property test takes."""

from hypothesis import settings


def examples(usual: int) -> int:
    """`usual`, or as many as the profile `thorough` of conftest.py sets."""
    chosen = settings.get_current_profile_name()
    return settings.default.max_examples if chosen == "thorough" else usual
