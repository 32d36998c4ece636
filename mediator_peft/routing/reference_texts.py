"""Requests in several wordings and languages, from which a fit learns how the wording of a request varies.

This project's own texts, none from a benchmark. The tasks do not matter, only that each is put in many ways.
"""

from __future__ import annotations

_WORDS = ("house", "river", "angry", "bread", "quick", "window")
_SENTENCES = (
    "The shop closes at six.",
    "I really enjoyed the concert last night.",
    "My parcel never arrived and nobody answers the phone.",
    "Bees visit thousands of flowers every day.",
)
_PLACES = ("Peru", "Norway", "Kenya", "Japan", "Chile", "Poland")
_SUMS = ("12 and 30", "5 and 48", "230 and 17", "9 and 9")
_THINGS = ("a bicycle", "the moon", "cheese", "a library", "thunder", "a violin")
_LENGTHS = ("12 miles", "3 feet", "250 yards", "40 inches")
_PEOPLE = ("Marie Curie", "Mozart", "Cleopatra", "Isaac Newton")
_DISHES = ("tomato soup", "pancakes", "fried rice", "apple pie")
_DATES = ("3 May 2011", "12/07/1998", "the first of June 2020", "24.12.2005")
_CODES = ("x = [i for i in range(3)]", "for (;;) { work(); }", "print(open('a.txt').read())", "grep -c error log")

REFERENCE_TASKS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        _WORDS,
        ("Translate this word into Italian: {}", "What is {} in Italian?", "{} - how do Italians say that?")
        + ("I need the Italian word for {}.", "Italian for {}, please", "Übersetze ins Italienische: {}")
        + ("Traduis ce mot en italien : {}", "¿Cómo se dice {} en italiano?"),
    ),
    (
        _WORDS,
        ("Give me a synonym of {}.", "Which other word means {}?", "{}: find a word with the same meaning")
        + ("Replace {} by something similar.", "How else can I say {}?", "Nenne ein Synonym für {}.")
        + ("Donne un synonyme de {}.", "Dame un sinónimo de {}."),
    ),
    (
        _WORDS,
        ("What is the opposite of {}?", "Name an antonym: {}", "I am looking for the contrary of {}.")
        + ("{} versus what? Tell me the opposite.", "Turn {} into its opposite.", "Was ist das Gegenteil von {}?")
        + ("Quel est le contraire de {} ?", "¿Cuál es el opuesto de {}?"),
    ),
    (
        _WORDS,
        (
            "What rhymes with {}?",
            "Find a rhyme for {}.",
            "{} - rhyming words?",
            "My song needs something that rhymes on {}.",
        )
        + ("List rhymes: {}", "Was reimt sich auf {}?", "Trouve une rime pour {}.", "¿Qué rima con {}?"),
    ),
    (
        _WORDS,
        ("What does {} mean?", "Define {}.", "Explain the meaning of the word {}.", "{} definition")
        + (
            "I do not understand the word {}. What is it?",
            "Was bedeutet {}?",
            "Que veut dire {} ?",
            "¿Qué significa {}?",
        ),
    ),
    (
        _WORDS,
        ("Use {} in a sentence.", "Write an example sentence with {}.", "Show me how {} is used.")
        + ("Make up a sentence that contains {}.", "Sentence with {}:", "Bilde einen Satz mit {}.")
        + ("Fais une phrase avec {}.", "Escribe una frase con {}."),
    ),
    (
        _WORDS,
        (
            "How many letters has {}?",
            "Count the letters of {}.",
            "Number of characters in {}?",
            "{} has how many letters?",
        )
        + ("Tell me the length of the word {}.", "Wie viele Buchstaben hat {}?", "Combien de lettres dans {} ?")
        + ("¿Cuántas letras tiene {}?",),
    ),
    (
        _PLACES,
        ("What is the capital of {}?", "Which city is the seat of government of {}?", "{}'s capital?")
        + ("Name the capital city: {}", "I forgot the capital of {}, please help.", "Was ist die Hauptstadt von {}?")
        + ("Quelle est la capitale de {} ?", "¿Cuál es la capital de {}?"),
    ),
    (
        _PLACES,
        (
            "Plan a week in {}.",
            "I am going to {}. What should I see?",
            "Travel tips for {}?",
            "{} in seven days: an itinerary",
        )
        + ("What are the sights of {}?", "Plane eine Woche in {}.", "Prépare un voyage d'une semaine : {}")
        + ("Planea una semana en {}.",),
    ),
    (
        _SUMS,
        ("Add {}.", "What is the sum of {}?", "{} together make what?", "Please calculate the total of {}.")
        + ("How much are {} combined?", "Addiere {}.", "Additionne {}.", "Suma {}."),
    ),
    (
        _LENGTHS,
        ("Convert {} to metres.", "How many metres are {}?", "{} in metres", "Express {} in the metric system.")
        + (
            "I need {} as metres, please.",
            "Rechne {} in Meter um.",
            "Convertis {} en mètres.",
            "Convierte {} a metros.",
        ),
    ),
    (
        _DATES,
        ("Write this date in ISO format: {}", "{} as YYYY-MM-DD", "What would {} look like as an ISO date?")
        + ("Normalise the date {}.", "Reformat {} for a database.", "Schreibe das Datum {} im ISO-Format.")
        + ("Mets la date {} au format ISO.", "Escribe la fecha {} en formato ISO."),
    ),
    (
        _DATES,
        ("Which day of the week was {}?", "{} - what weekday?", "Was {} a Monday or another day?")
        + ("Find the weekday of {}.", "On what day did {} fall?", "Welcher Wochentag war der {}?")
        + ("Quel jour de la semaine était le {} ?", "¿Qué día de la semana fue el {}?"),
    ),
    (
        _SENTENCES,
        ("Summarise this: {}", "{} What is the gist?", "Give me the short version of the following. {}")
        + ("In three words: {}", "tl;dr {}", "Fasse das zusammen: {}", "Résume ceci : {}", "Resume esto: {}"),
    ),
    (
        _SENTENCES,
        ("Is this positive or negative? {}", "Sentiment of the text: {}", "{} Does the writer sound happy?")
        + ("Classify the mood. {}", "Judge the tone of this message: {}", "Ist das positiv oder negativ? {}")
        + ("Est-ce positif ou négatif ? {}", "¿Es positivo o negativo? {}"),
    ),
    (
        _SENTENCES,
        ("Translate into Dutch: {}", "How do you say this in Dutch? {}", "{} - in Dutch, please")
        + ("Give the Dutch translation of: {}", "Dutch version? {}", "Übersetze ins Niederländische: {}")
        + ("Traduis en néerlandais : {}", "Traduce al neerlandés: {}"),
    ),
    (
        _SENTENCES,
        ("Make this more polite: {}", "{} Rewrite it in a formal tone.", "Can you say this in a friendlier way? {}")
        + ("I would like a more courteous version: {}", "Polish the tone. {}", "Formuliere höflicher: {}")
        + ("Reformule plus poliment : {}", "Dilo con más cortesía: {}"),
    ),
    (
        _SENTENCES,
        ("Put this into the past tense: {}", "{} How does it read in the past?", "Change the tense to past. {}")
        + ("Past tense of this sentence? {}", "Pretend it happened yesterday: {}", "Setze das in die Vergangenheit: {}")
        + ("Mets au passé : {}", "Ponlo en pasado: {}"),
    ),
    (
        _SENTENCES,
        ("List the nouns: {}", "Which words of this are nouns? {}", "{} Extract all nouns.", "Find every noun in: {}")
        + (
            "Nouns only, please. {}",
            "Nenne die Substantive: {}",
            "Trouve les noms : {}",
            "Enumera los sustantivos: {}",
        ),
    ),
    (
        _THINGS,
        ("Write a poem about {}.", "A few verses on {}, please", "Compose some rhymes about {}.", "{} - make it a poem")
        + ("I want a short lyric on {}.", "Schreibe ein Gedicht über {}.", "Écris un poème sur {}.")
        + ("Escribe un poema sobre {}.",),
    ),
    (
        _THINGS,
        ("Explain {} to a child.", "What is {}, in simple words?", "Describe {} so that a five-year-old understands.")
        + ("Tell a kid about {}.", "{} explained simply", "Erkläre einem Kind: {}", "Explique à un enfant : {}")
        + ("Explica a un niño: {}",),
    ),
    (
        _THINGS,
        ("Invent a slogan for {}.", "I sell {}. What could my slogan be?", "Advertising line: {}")
        + ("Make people want {} with one phrase.", "{} needs a catchy motto.", "Erfinde einen Slogan für {}.")
        + ("Invente un slogan pour {}.", "Inventa un eslogan para {}."),
    ),
    (
        _PEOPLE,
        ("When was {} born?", "Give the year of birth of {}.", "{}, date of birth?", "How old would {} be today?")
        + ("In which year did {} come into the world?", "Wann wurde {} geboren?", "En quelle année est né {} ?")
        + ("¿Cuándo nació {}?",),
    ),
    (
        _DISHES,
        ("Give me a recipe for {}.", "How do I cook {}?", "{}: ingredients and steps", "What goes into {}?")
        + ("I want to make {} tonight. Help!", "Gib mir ein Rezept für {}.", "Donne la recette : {}")
        + ("Dame la receta de {}.",),
    ),
    (
        _CODES,
        ("What does this code do? {}", "Explain line by line: {}", "{} I do not understand this snippet.")
        + ("Describe the effect of: {}", "Comment this code. {}", "Was macht dieser Code? {}", "Que fait ce code ? {}")
        + ("¿Qué hace este código? {}",),
    ),
    (
        _CODES,
        (
            "Find the bug: {}",
            "Is there an error in this? {}",
            "{} does not work, why?",
            "Review this code for mistakes. {}",
        )
        + ("Debug it for me: {}", "Finde den Fehler: {}", "Trouve l'erreur : {}", "Encuentra el error: {}"),
    ),
)
"""(items, wordings) of each task; ``{}`` is one of the items."""
