from typing import Any

from django.db import migrations, models
from django.db.models import F


def as_announced(apps: Any, schema_editor: Any) -> None:
    """Webhooks were sent when they were queued, as far as is known: none goes out again."""
    apps.get_model("conversations", "HandOver").objects.update(posted_at=F("announced_at"))


class Migration(migrations.Migration):
    dependencies = [("conversations", "0008_handover_mailed_at")]

    operations = [
        migrations.AddField(
            model_name="handover",
            name="posted_at",
            field=models.DateTimeField(blank=True, null=True),
        ),
        migrations.RunPython(as_announced, migrations.RunPython.noop),
    ]
