"""Mount namespaces of the tests' own: they hold no mount of a test that runs beside them.

A copy of a mount keeps its loop device in use after the mount itself is gone, so the other test could not take its set
down.
"""

from __future__ import annotations

LET_GO = """awk -v keep="$KEEP" '$5 ~ "^(/var)?/tmp/" && (keep == "" || index($5, keep) != 1) {print $5}' \
/proc/self/mountinfo | tac | xargs -r -n1 umount --lazy 2>/dev/null || true"""
"""A shell's first words in such a namespace; what lies below $KEEP stays."""
