"""The one exception for mistakes that the user can put right."""


class UserError(ValueError):
    """A mistake of the user's, told in one line: what was wrong, where, and what to do."""
