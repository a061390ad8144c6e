"""Names of schedules, layers, models and files that do something to what shows them."""

NAMES = {
    "red": "\x1b[31mred",
    "cleared": "\x1b[2J\x1b[H",
    "title": "\x1b]0;owned\x07",
    "link": "\x1b]8;;https://example.org\x1b\\click\x1b]8;;\x1b\\",
    "one byte": "\x9b31mred",
    "bold": "[bold]x",
    "closed": "[/x]",
    "closed bold": "x[/bold]",
    "all closed": "[/]",
    "linked": "[link=https://example.org]x[/link]",
    "called": "[@click=app.quit]x",
    "open": "[",
    "emoji": ":smile:",
    "escaped": "\\[bold]",
    "script": "<script>alert(1)</script>",
    "end of script": "</script><script>alert(1)</script>",
    "comment": "<!--<script>",
    "cdata": "]]>",
    "element": "<b>x</b>",
    "entity": "&lt;&#0;&amp;",
    "quotes": "\"x' onload='alert(1)",
    "image": '"><img src=x onerror=alert(1)>',
    "template": "${alert(1)}`",
    "data": "/*DATA*/null",
    "format": "{0}{x}%s%(x)s%n",
    "bell": "x\x07",
    "backspaces": "good\b\b\b\bevil",
    "return": "good\revil",
    "newline": "good\nerror: evil",
    "tab": "a\tb",
    "null": "a\x00b",
    "delete": "a\x7fb",
    "override": "a\u202etxt.exe",
    "isolate": "\u2066a\u2069b",
    "mark": "a\u200fb",
    "separator": "a\u2028b\u2029c",
    "zero width": "a\u200b\u2060b",
    "nothing": "\ufeff\ufffe\uffff",
    "other planes": "\U000e0041\U0010ffff",
    "not UTF-8": "a\udcff\udc80b",
    "lone": "\ud800",
    "long": "x" * 100_000,
    "long and marked": "[/x]" * 20_000,
    "combined": "a" + "\u0301" * 5000,
}
"""By what they are."""


def files() -> dict[str, str]:
    """Those that a file can have."""
    return {what: name for what, name in NAMES.items() if what != "lone" and not set(name) & {"/", "\0"} and len(name) < 99}
