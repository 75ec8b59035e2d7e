"""The index of full-text search, where the database is PostgreSQL; see ``conversations.search``."""

from django.db import migrations


def make_index(apps, schema_editor):
    if schema_editor.connection.vendor == "postgresql":
        schema_editor.execute("SET LOCAL statement_timeout = 0")  # a big table takes its minutes
        schema_editor.execute(
            "CREATE INDEX message_fulltext ON conversations_message "
            "USING gin (to_tsvector('english', text))"
        )


def drop_index(apps, schema_editor):
    if schema_editor.connection.vendor == "postgresql":
        schema_editor.execute("DROP INDEX message_fulltext")


class Migration(migrations.Migration):

    dependencies = [
        ('conversations', '0002_feedback'),
    ]

    operations = [migrations.RunPython(make_index, drop_index)]
