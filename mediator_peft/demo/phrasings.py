"""Hand-written wordings for the hard prompt sets: ``{x}`` stands for the item's bare content."""

from __future__ import annotations

SEEN: dict[str, tuple[str, ...]] = {
    "maths": (
        "{x}",
        "Solve this problem: {x}",
        "{x} Show your working.",
        "Here is a word problem. {x}",
    ),
    "cron": (
        "Write a cron expression for this schedule: {x}",
        "Convert this schedule to cron syntax: {x}",
        "{x}. What is the cron expression?",
        "Give me the crontab entry that runs: {x}",
    ),
    "spelling": (
        "Correct the spelling: {x}",
        "Fix the misspelled word: {x}",
        "How is this word spelled correctly? {x}",
        'The word "{x}" is misspelled. Write it correctly.',
    ),
}
"""Wordings the router is calibrated on; the first is the one the demo's experts were trained on."""

UNSEEN: dict[str, tuple[str, ...]] = {
    "maths": (
        "My homework says: {x} Can you help me?",
        "{x} Please think step by step and tell me the final number.",
        "Question: {x}\nAnswer:",
        "I need the answer to the following exercise.\n\n{x}",
    ),
    "cron": (
        "I want a job to run like this: {x}. Which five cron fields do I need?",
        "crontab line for the following, please - {x}",
        "Schedule: {x}\nCron:",
        "Translate into a five-field cron string.\n\n{x}",
    ),
    "spelling": (
        "I typed {x}. What word did I mean?",
        "Spellcheck, please - {x}",
        "Wrong: {x}\nRight:",
        "Which English word is {x} supposed to be?",
    ),
}
"""Wordings held out from calibration."""

OTHER_LANGUAGE: dict[str, tuple[tuple[str, str], ...]] = {
    "cron": (
        ("de_DE", "Schreibe einen Cron-Ausdruck für diesen Zeitplan: {x}"),
        ("es_ES", "Escribe una expresión cron para este horario: {x}"),
        ("fr_FR", "Écris une expression cron pour cet horaire : {x}"),
    ),
    "spelling": (
        ("de", "Korrigiere die Rechtschreibung dieses englischen Wortes: {x}"),
        ("es", "Corrige la ortografía de esta palabra inglesa: {x}"),
        ("fr", "Corrige l'orthographe de ce mot anglais : {x}"),
    ),
    "maths": (
        ("de", "Anna hat {a} Äpfel. Ihr Bruder hat {b} Äpfel weniger. Wie viele Äpfel haben sie zusammen?"),
        ("es", "Ana tiene {a} manzanas. Su hermano tiene {b} manzanas menos. ¿Cuántas manzanas tienen en total?"),
        ("fr", "Anne a {a} pommes. Son frère a {b} pommes de moins. Combien de pommes ont-ils ensemble ?"),
    ),
}
"""Language and wording; the maths ones share one sum: ``a + (a - b)``."""

SHORT_MATHS = (
    "{a} apples, {b} fewer for his brother: how many together?",
    "{a} pens at ${b} each. Total?",
    "{a} pages a day, {b} days. How many pages?",
)

EARLIER_TURNS: tuple[tuple[str, str], ...] = (
    ("Hello! Who are you?", "I am an assistant. How can I help you?"),
    ("What is the capital of France?", "The capital of France is Paris."),
    ("Thanks, that was helpful.", "You are welcome! Is there anything else?"),
    ("Tell me a fun fact.", "Honey never spoils."),
)
"""A user turn about something else, and an answer to it."""

FAR_UNKNOWN: dict[str, tuple[str, ...]] = {
    "chat": (
        "Hi there, how are you today?",
        "Tell me a joke about {x}.",
        "I feel a bit tired after the weekend. Any advice?",
        "Recommend me a film about {x}.",
        "What do you think about {x}?",
        "Write a friendly message to my neighbour about {x}.",
    ),
    "code": (
        "Write a Python function that sorts a list of {x}.",
        "Why does my JavaScript print undefined when I log {x}?",
        "Explain recursion with an example about {x}.",
        "def count_{x}(items):\n    # complete this function",
        "How do I rename a git branch called {x}?",
    ),
}
"""Kinds that are far from every expert; ``{x}`` is one of ``TOPICS``."""

TOPICS = (
    "cats",
    "music",
    "gardens",
    "trains",
    "football",
    "cheese",
    "winter",
    "robots",
    "birds",
    "coffee",
    "books",
    "rivers",
    "bridges",
    "dreams",
    "ships",
    "chess",
    "pizza",
    "stars",
    "bicycles",
    "castles",
)

PLURALS = """city cities|box boxes|child children|mouse mice|leaf leaves|baby babies|wolf wolves|tooth teeth
church churches|knife knives|woman women|man men|bus buses|dish dishes|party parties|hero heroes|potato potatoes
foot feet|wife wives|life lives|story stories|glass glasses|country countries|fox foxes|lady ladies|half halves
watch watches|tomato tomatoes|goose geese|person people|shelf shelves|family families|class classes|brush brushes
army armies|loaf loaves|berry berries|peach peaches|thief thieves|fly flies|dress dresses|calf calves
factory factories|bench benches|echo echoes|ox oxen|puppy puppies|tax taxes"""
"""Singular and plural: a question about one word, near to spelling."""
