"""What a terminal shows of text in which carriage returns and backspaces overwrite."""


def shown(text: str) -> str:
    """Text as a terminal shows it; the last line, which may go on, keeps a carriage return at its end."""
    if "\r" not in text and "\b" not in text:
        return text
    *lines, last = text.split("\n")
    return "\n".join([*map(_overwritten, lines), _overwritten(last) + "\r" * last.endswith("\r")])


def _overwritten(line: str) -> str:
    """A line, which may end in a carriage return itself, as in `\\r\\n`."""
    line = line.rstrip("\r").rpartition("\r")[2]
    if "\b" not in line:
        return line
    characters: list[str] = []
    for character in line:
        if character != "\b":
            characters.append(character)
        elif characters:
            characters.pop()
    return "".join(characters)
