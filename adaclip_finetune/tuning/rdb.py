"""Optuna's storage in a database, with what can go wrong on the way told to the user; never with a password."""

from __future__ import annotations

import random
import re
import time
import warnings
from typing import Any

from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import RDBStorage
from sqlalchemy import make_url
from sqlalchemy.engine import URL
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    IntegrityError,
    NoSuchModuleError,
    OperationalError,
    ProgrammingError,
    SQLAlchemyError,
)

from adaclip_finetune.errors import UserError

_ATTEMPTS = 10

# Module that SQLAlchemy asks for → what to install, where the two differ.
_PACKAGES = {"psycopg": "psycopg[binary]", "psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient"}


def parse_url(url: str) -> URL:
    """Raises UserError for what is no database URL that SQLAlchemy knows."""
    # Not shown where it cannot be told which part of it is the password.
    unreadable = UserError(
        "optuna_cfg.storage is no URL of a database such as postgresql://USER:PASSWORD@HOST:5432/DATABASE; in a "
        "password, write @ as %40, / as %2F, : as %3A and % as %25"
    )
    if url.count("@") > 1 and not url.startswith("sqlite"):
        raise unreadable
    try:
        parsed = make_url(url)
        parsed.get_dialect()
    except NoSuchModuleError:
        scheme = parsed.drivername
        instead = "; write postgresql://" if scheme.startswith("postgres") else ""
        raise UserError(
            f"optuna_cfg.storage begins with {scheme}://, which is no database known here{instead} (sqlite:///FILE, "
            "postgresql://… and mysql+pymysql://… are, and without :// the path of a journal file)"
        ) from None
    except (ArgumentError, ValueError):  # ValueError: a port that is no number
        raise unreadable from None
    except ImportError as error:
        raise _missing_driver(parsed, error) from None
    return parsed


def open_rdb(url: URL, **options: Any) -> RDBStorage:
    """Tables are made where there are none. Raises UserError."""
    for _ in range(_ATTEMPTS):
        try:
            return _open(url, options)
        except (IntegrityError, ProgrammingError, OperationalError) as error:
            if not re.search("exists|duplicate", str(error), re.IGNORECASE):
                raise cannot_be_used(url, error) from None
            failure: Exception = error
            time.sleep(random.random())  # another process, begun at the same moment, is making the tables too
        except (SQLAlchemyError, StorageInternalError) as error:
            raise cannot_be_used(url, error) from None
        except RuntimeError as error:  # "The runtime optuna version … is no longer compatible with the table schema …"
            raise UserError(f"optuna_cfg.storage: {without_password(url)}: {error}") from None
        except ImportError as error:
            raise _missing_driver(url, error.__cause__ or error) from None
    raise cannot_be_used(url, failure)


def cannot_be_used(place: URL | str, error: Exception) -> UserError:
    """What a database, its driver, or the file system said."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) and error.__cause__ else error
    said = str(cause.orig if isinstance(cause, DBAPIError) else cause).strip() or type(cause).__name__
    if isinstance(place, URL):
        for secret in _secrets(place).values():
            said = said.replace(secret, "***")
    lines = " ".join(line.strip() for line in said.splitlines())
    return UserError(f"optuna_cfg.storage: {without_password(place)} cannot be used: {lines}")


def without_password(place: URL | str) -> str:
    """For messages."""
    if isinstance(place, str):
        return place
    hidden = place.update_query_dict({name: "***" for name in _secrets(place) if name in place.query})
    return hidden.render_as_string(hide_password=True)


def _open(url: URL, options: dict[str, Any]) -> RDBStorage:
    text = url.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}")  # for Optuna, a template
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # heartbeats
        return RDBStorage(text, **options)


def _secrets(url: URL) -> dict[str, str]:
    """Passwords in it; drivers take them in the query too."""
    found = {name: str(value) for name, value in url.query.items() if "pass" in name.lower()}
    return found | ({"": str(url.password)} if url.password else {})


def _missing_driver(url: URL, error: BaseException) -> UserError:
    module = getattr(error, "name", None) or str(error)
    package = _PACKAGES.get(module, module)
    other = " (or write mysql+pymysql://… and pip install pymysql)" if module == "MySQLdb" else ""
    return UserError(
        f'optuna_cfg.storage: {without_password(url)} needs the Python package {module}: pip install "{package}"{other}'
    )
