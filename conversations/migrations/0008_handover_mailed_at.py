"""When a mail told of a hand-over; of those before this, when it was announced: nobody is told
again."""

from typing import Any

from django.db import migrations, models
from django.db.models import F


def were_mailed(apps: Any, schema_editor: Any) -> None:
    apps.get_model("conversations", "HandOver").objects.update(mailed_at=F("announced_at"))


class Migration(migrations.Migration):
    dependencies = [("conversations", "0007_handover")]

    operations = [
        migrations.AddField(
            model_name="handover",
            name="mailed_at",
            field=models.DateTimeField(blank=True, null=True),
        ),
        migrations.RunPython(were_mailed, migrations.RunPython.noop),
    ]
