"""Full-text search as one lookup, ``text__fulltext="lost parcel"``, spoken by each database.

PostgreSQL: its own full text, English stems, quotes, ``or`` and ``-word``, by a GIN index made in
migration 0003. Elsewhere: every word somewhere in the text, by LIKE, nothing of it a wildcard.
Knows how words are matched; whose rows may be searched is said by ``visible_to``.
"""

from __future__ import annotations

import re
from typing import Any

from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.models import CharField, Lookup, TextField
from django.db.models.sql.compiler import SQLCompiler

MAX_QUERY_CHARS = 200
#: LIKE looks for no more; each is a scan of its own.
MAX_WORDS = 8


@CharField.register_lookup
@TextField.register_lookup
class FullText(Lookup):
    lookup_name = "fulltext"
    prepare_rhs = False

    def as_sql(
        self, compiler: SQLCompiler, connection: BaseDatabaseWrapper
    ) -> tuple[str, tuple[Any, ...]]:
        column, values = self.process_lhs(compiler, connection)
        words = str(self.rhs).split()[:MAX_WORDS]
        each = rf"{column} LIKE %s ESCAPE '\'"
        params = [value for word in words for value in (*values, f"%{_literal(word)}%")]
        return f"({' AND '.join([each] * len(words))})", tuple(params)

    def as_postgresql(
        self, compiler: SQLCompiler, connection: BaseDatabaseWrapper
    ) -> tuple[str, tuple[Any, ...]]:
        column, values = self.process_lhs(compiler, connection)
        # Written exactly as in the index, or it would not be used.
        sql = f"to_tsvector('english', {column}) @@ websearch_to_tsquery('english', %s)"
        return sql, (*values, str(self.rhs))


def _literal(word: str) -> str:
    return re.sub(r"([\\%_])", r"\\\1", word)
