"""The one exception that is meant for users.

Whatever a user can get wrong (a key, a path, a broken video) ends here: the command line prints the message alone
and exits with code 2. The message names the file, the key or row, the value and the way out.
"""


class UserError(Exception):
    """Something the user can mend. `str(error)` is all they will see."""
