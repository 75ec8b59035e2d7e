"""Queries that every question asks, whose SQL is written once.

Django writes a query's SQL anew each time, which takes several times as long as the database takes
to answer it. Only the text is kept, never a row or a value. Knows no table; of Django's compiler it
knows that SQL comes from ``as_sql``.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any, Generic, TypeVar, cast

from django.db import DEFAULT_DB_ALIAS, connections
from django.db.models import Field, Model, QuerySet
from django.db.models.query import ModelIterable

M = TypeVar("M", bound=Model)


class Compiled(Generic[M]):
    """The rows of ``build(*values)``. ``fields``: of what columns the values are, in the order in
    which the query compares them; it may compare nothing else."""

    def __init__(self, build: Callable[..., QuerySet[M]], *fields: Field[Any, Any]) -> None:
        self._build, self._fields = build, fields
        self._written: dict[str, tuple[Any, str]] = {}

    def __call__(self, *values: Any) -> list[M]:
        """Raises: TypeError if the query compares something else, the first time."""
        connection = connections[DEFAULT_DB_ALIAS]
        params = tuple(
            field.get_db_prep_value(value, connection)
            for field, value in zip(self._fields, values, strict=True)
        )
        if connection.vendor not in self._written:
            self._written[connection.vendor] = self._write(values, params)
        compiler, sql = self._written[connection.vendor]
        return list(ModelIterable(cast(Any, _Asked(compiler, connection, sql, params))))

    def _write(self, values: tuple[Any, ...], params: tuple[Any, ...]) -> tuple[Any, str]:
        compiler = self._build(*values).query.get_compiler(DEFAULT_DB_ALIAS)
        sql, compared = compiler.as_sql()
        if tuple(compared) != params:
            raise TypeError("The query compares other values than those it is given.")
        compiler.connection = None  # this thread's
        return compiler, sql


class _Asked:
    """What ``ModelIterable`` wants of a queryset."""

    db = DEFAULT_DB_ALIAS
    _known_related_objects: dict[Any, Any] = {}

    def __init__(self, compiler: Any, connection: Any, sql: str, params: tuple[Any, ...]) -> None:
        self.query = self
        self._compiler = copy(compiler)  # which a run leaves its traces in
        self._compiler.connection = connection
        self._compiler.as_sql = lambda: (sql, params)

    def get_compiler(self, using: str) -> Any:
        return self._compiler
