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

_NUMBERS = ("37", "410", "2048", "15", "999", "6021")
_LISTS = ("milk, eggs, rice", "red, blue, green, black", "Anna, Tom, Wei", "9, 2, 14, 5")
_JOBS = ("a nurse", "a pilot", "a baker", "a judge")

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

FURTHER_TASKS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        _WORDS,
        (
            "Give me the plural of {}.",
            "What is {} in the plural?",
            "More than one {} is called what?",
            "{} - plural form?",
            "I need the plural: {}",
            "Wie heißt der Plural von {}?",
            "Qual è il plurale di {}?",
            "Podaj liczbę mnogą: {}",
        ),
    ),
    (
        _WORDS,
        (
            "Translate {} into Japanese.",
            "How do you say {} in Japanese?",
            "Japanese word for {}?",
            "{} - what is it called in Japan?",
            "I want to say {} to a Japanese friend.",
            "Was heißt {} auf Japanisch?",
            "Comment dit-on {} en japonais ?",
            "{}用日语怎么说?",
        ),
    ),
    (
        _WORDS,
        (
            "List words that begin like {}.",
            "Which words have the same first letter as {}?",
            "Find terms that start as {} does.",
            "Give me more words with the initial of {}.",
            "{}: same initial, other words",
            "Nenne Wörter mit dem Anfangsbuchstaben von {}.",
            "Des mots qui commencent comme {} ?",
            "Palabras que empiezan como {}",
        ),
    ),
    (
        _NUMBERS,
        (
            "Is {} even or odd?",
            "Can {} be divided by two?",
            "{} - odd or even?",
            "Tell me the parity of {}.",
            "Does {} leave a remainder when halved?",
            "Ist {} gerade oder ungerade?",
            "{} est-il pair ?",
            "¿Es {} par o impar?",
        ),
    ),
    (
        _NUMBERS,
        (
            "Double {}.",
            "What is twice {}?",
            "{} times two",
            "Multiply {} by 2.",
            "How much is two times {}?",
            "Verdopple {}.",
            "Quel est le double de {} ?",
            "Qual é o dobro de {}?",
        ),
    ),
    (
        _NUMBERS,
        (
            "Write {} in hexadecimal.",
            "{} in base 16?",
            "Hex value of {}",
            "Convert {} to a hex number.",
            "What does {} look like in the hexadecimal system?",
            "Schreibe {} hexadezimal.",
            "Écris {} en hexadécimal.",
            "Converti {} in esadecimale.",
        ),
    ),
    (
        _NUMBERS,
        (
            "What happened in the year {}?",
            "Name an event of the year {}.",
            "{} in history",
            "Anything important in {}?",
            "Tell me about the year {}.",
            "Was geschah im Jahr {}?",
            "Que s'est-il passé en {} ?",
            "Что произошло в {} году?",
        ),
    ),
    (
        _NUMBERS,
        (
            "Count from {} to the next ten.",
            "Which numbers follow {} up to the next multiple of ten?",
            "Go on counting: {}",
            "Continue the count after {}.",
            "List the numbers after {}.",
            "Zähle ab {} weiter.",
            "Compte à partir de {}.",
            "Cuenta desde {}.",
        ),
    ),
    (
        _PLACES,
        (
            "Which currency do they use in {}?",
            "How do people pay in {}?",
            "Money of {}?",
            "Name the currency: {}",
            "{} - what is the official currency?",
            "Welche Währung hat {}?",
            "Quelle est la monnaie : {} ?",
            "Jaka waluta jest w {}?",
        ),
    ),
    (
        _PLACES,
        (
            "Which language do people speak in {}?",
            "Official languages of {}",
            "{} - language?",
            "What would I need to learn to talk to people in {}?",
            "Tell me the main language of {}.",
            "Welche Sprache spricht man in {}?",
            "Que lingua si parla in {}?",
            "¿Qué idioma se habla en {}?",
        ),
    ),
    (
        _PLACES,
        (
            "Which countries border {}?",
            "Neighbours of {}?",
            "{} shares a frontier with whom?",
            "List the states next to {}.",
            "What lies around {}?",
            "Welche Länder grenzen an {}?",
            "Quels pays bordent {} ?",
            "Welke landen grenzen aan {}?",
        ),
    ),
    (
        _SENTENCES,
        (
            "Translate into Spanish: {}",
            "{} In Spanish, please.",
            "How would a Spaniard say this? {}",
            "Spanish version of: {}",
            "Give me this sentence in Spanish. {}",
            "Übersetze ins Spanische: {}",
            "Traduis en espagnol : {}",
            "Traduci in spagnolo: {}",
        ),
    ),
    (
        _SENTENCES,
        (
            "Turn this into a question: {}",
            "{} Ask that instead of stating it.",
            "Make a question of the statement. {}",
            "How would it read as a question? {}",
            "Question form: {}",
            "Mache daraus eine Frage: {}",
            "Transforme en question : {}",
            "Convierte en pregunta: {}",
        ),
    ),
    (
        _SENTENCES,
        (
            "How many words are in this? {}",
            "Count the words: {}",
            "{} What is the word count?",
            "Number of words of the text: {}",
            "Tell me how long this is in words. {}",
            "Wie viele Wörter sind das? {}",
            "Combien de mots ? {}",
            "¿Cuántas palabras hay? {}",
        ),
    ),
    (
        _SENTENCES,
        (
            "Continue this text: {}",
            "{} What happens next?",
            "Write what comes after this. {}",
            "Add two more sentences. {}",
            "Go on: {}",
            "Schreibe weiter: {}",
            "Continue le texte : {}",
            "Continua il testo: {}",
        ),
    ),
    (
        _SENTENCES,
        (
            "Write a reply to this: {}",
            "{} What should I answer?",
            "Help me to respond. {}",
            "Draft an answer to the following. {}",
            "Someone wrote me: {} Answer it.",
            "Antworte darauf: {}",
            "Réponds à ceci : {}",
            "Responde a esto: {}",
        ),
    ),
    (
        _SENTENCES,
        (
            "Is this sentence grammatically right? {}",
            "{} Any grammar errors?",
            "Check the grammar: {}",
            "Have I made a grammatical mistake? {}",
            "Grammar of this fine? {}",
            "Ist die Grammatik richtig? {}",
            "La grammaire est-elle correcte ? {}",
            "¿Está bien la gramática? {}",
        ),
    ),
    (
        _SENTENCES,
        (
            "Give this text a title: {}",
            "{} What would be a good headline?",
            "Headline for: {}",
            "Find a title for the following. {}",
            "Name this text. {}",
            "Finde eine Überschrift: {}",
            "Trouve un titre : {}",
            "Dai un titolo: {}",
        ),
    ),
    (
        _THINGS,
        (
            "Tell me a joke about {}.",
            "Make me laugh with something on {}.",
            "{}: a funny one, please",
            "Know any jokes on {}?",
            "Say something funny about {}.",
            "Erzähle einen Witz über {}.",
            "Raconte une blague sur {}.",
            "Cuéntame un chiste sobre {}.",
        ),
    ),
    (
        _THINGS,
        (
            "Who invented or discovered {}?",
            "To whom do we owe {}?",
            "{} - whose idea was it?",
            "Name the inventor of {}.",
            "Since when has {} been known, and by whom?",
            "Wer hat es erfunden: {}?",
            "Qui a inventé cela : {} ?",
            "Chi ha inventato {}?",
        ),
    ),
    (
        _THINGS,
        (
            "Write a short story about {}.",
            "A tale in which {} plays a part",
            "Tell a story with {}.",
            "{} - spin a yarn",
            "I would like to read a story about {}.",
            "Schreibe eine Geschichte über {}.",
            "Écris une histoire sur {}.",
            "Napisz opowiadanie: {}",
        ),
    ),
    (
        _THINGS,
        (
            "How much does {} cost?",
            "Price of {}?",
            "What would I pay for {}?",
            "Is {} expensive?",
            "{} - how many euros roughly?",
            "Was kostet {}?",
            "Combien coûte {} ?",
            "¿Cuánto cuesta {}?",
        ),
    ),
    (
        _THINGS,
        (
            "Draw {} with characters.",
            "ASCII art of {}",
            "Make a picture of {} out of letters and signs.",
            "{} as text art",
            "Sketch {} in plain text.",
            "Zeichne {} aus Zeichen.",
            "Dessine {} en ASCII.",
            "Dibuja {} con letras.",
        ),
    ),
    (
        _PEOPLE,
        (
            "What is {} famous for?",
            "Why do we remember {}?",
            "{}'s greatest achievement?",
            "Who was {}?",
            "In a sentence: why is {} known?",
            "Wofür ist {} bekannt?",
            "Pourquoi connaît-on {} ?",
            "Dlaczego {} jest znany?",
        ),
    ),
    (
        _PEOPLE,
        (
            "Write an interview with {}.",
            "Questions you would ask {}",
            "Imagine talking to {}. What do you ask?",
            "{} is our guest today. Start the interview.",
            "Make up an interview: {}",
            "Führe ein Interview mit {}.",
            "Invente une interview avec {}.",
            "Inventa una entrevista con {}.",
        ),
    ),
    (
        _DISHES,
        (
            "How many calories has {}?",
            "Is {} fattening?",
            "Energy content of {}",
            "{} - kcal?",
            "What does a plate of {} have in calories?",
            "Wie viele Kalorien hat {}?",
            "Combien de calories dans {} ?",
            "Quante calorie ha {}?",
        ),
    ),
    (
        _DISHES,
        (
            "Which wine goes with {}?",
            "What should we drink with {}?",
            "{}: suggest a drink",
            "Pair {} with a beverage.",
            "I serve {} tonight. Any drinks that match?",
            "Welcher Wein passt zu {}?",
            "Que boire avec {} ?",
            "¿Qué vino va con {}?",
        ),
    ),
    (
        _LISTS,
        (
            "Sort this list: {}",
            "{} - put them in order",
            "Bring these into alphabetical or numerical order: {}",
            "Order, please: {}",
            "Arrange the items. {}",
            "Sortiere: {}",
            "Trie cette liste : {}",
            "Ordena la lista: {}",
        ),
    ),
    (
        _LISTS,
        (
            "Make JSON of this: {}",
            "{} as a JSON array",
            "Convert the list to JSON. {}",
            "I need this machine-readable, in JSON: {}",
            "JSON: {}",
            "Wandle in JSON um: {}",
            "Mets ceci en JSON : {}",
            "Converti in JSON: {}",
        ),
    ),
    (
        _LISTS,
        (
            "Pick one at random: {}",
            "{} - choose one for me",
            "Which one should I take? {}",
            "Decide for me: {}",
            "Draw lots. {}",
            "Wähle eines aus: {}",
            "Choisis-en un : {}",
            "Elige uno: {}",
        ),
    ),
    (
        _LISTS,
        (
            "How many items are in this list? {}",
            "Count: {}",
            "{} - that makes how many?",
            "Length of the list {}?",
            "Number of elements: {}",
            "Wie viele sind das? {}",
            "Combien d'éléments : {}",
            "¿Cuántos elementos hay? {}",
        ),
    ),
    (
        _JOBS,
        (
            "What does {} earn?",
            "Salary of {}?",
            "How well is {} paid?",
            "{} - income per year?",
            "Tell me the usual pay of {}.",
            "Was verdient {}?",
            "Combien gagne {} ?",
            "¿Cuánto gana {}?",
        ),
    ),
    (
        _JOBS,
        (
            "How do I become {}?",
            "What must I study to be {}?",
            "My daughter wants to be {}. Which way leads there?",
            "Steps towards being {}",
            "{}: training needed?",
            "Wie wird man {}?",
            "Comment devenir {} ?",
            "Come si diventa {}?",
        ),
    ),
    (
        _CODES,
        (
            "Rewrite this in Java: {}",
            "{} - the same in Java, please",
            "Port to Java. {}",
            "Java equivalent of {}?",
            "I need this as Java code: {}",
            "Schreibe das in Java: {}",
            "Traduis ce code en Java : {}",
            "Pásalo a Java: {}",
        ),
    ),
    (
        _CODES,
        (
            "Add comments to this code: {}",
            "{} Document it.",
            "Explain it by comments in the source. {}",
            "Put a comment on each line: {}",
            "Please annotate: {}",
            "Kommentiere den Code: {}",
            "Ajoute des commentaires : {}",
            "Añade comentarios: {}",
        ),
    ),
    (
        _CODES,
        (
            "Make this faster: {}",
            "{} is too slow.",
            "Optimise it. {}",
            "How could the performance of this be improved? {}",
            "Speed up the following: {}",
            "Mach das schneller: {}",
            "Accélère ce code : {}",
            "Haz esto más rápido: {}",
        ),
    ),
)
"""More tasks, as in ``REFERENCE_TASKS``."""

FURTHER_LANGUAGES: tuple[tuple[tuple[int, str], ...], ...] = (
    (
        (1, "Dammi un sinonimo di {}."),
        (4, "Che cosa significa {}?"),
        (6, "Quante lettere ha {}?"),
        (9, "Somma {}."),
        (11, "Scrivi la data {} in formato ISO."),
        (14, "È positivo o negativo? {}"),
        (19, "Scrivi una poesia su {}."),
        (22, "Quando è nato {}?"),
        (24, "Che cosa fa questo codice? {}"),
    ),
    (
        (2, "Qual é o contrário de {}?"),
        (5, "Faz uma frase com {}."),
        (7, "Qual é a capital: {}?"),
        (10, "Converte {} em metros."),
        (13, "Resume isto: {}"),
        (16, "Torna mais educado: {}"),
        (20, "Explica a uma criança: {}"),
        (23, "Dá a receita: {}"),
        (25, "Encontra o erro: {}"),
    ),
    (
        (1, "Geef een synoniem van {}."),
        (4, "Wat betekent {}?"),
        (6, "Hoeveel letters heeft {}?"),
        (9, "Tel {} op."),
        (11, "Schrijf de datum {} in ISO-formaat."),
        (14, "Is dit positief of negatief? {}"),
        (19, "Schrijf een gedicht over {}."),
        (22, "Wanneer is {} geboren?"),
        (24, "Wat doet deze code? {}"),
    ),
    (
        (2, "Jakie jest przeciwieństwo słowa {}?"),
        (5, "Ułóż zdanie ze słowem {}."),
        (7, "Jaka jest stolica: {}?"),
        (10, "Przelicz {} na metry."),
        (13, "Streść to: {}"),
        (16, "Napisz to grzeczniej: {}"),
        (20, "Wyjaśnij dziecku: {}"),
        (23, "Podaj przepis: {}"),
        (25, "Znajdź błąd: {}"),
    ),
    (
        (1, "Назови синоним слова {}."),
        (4, "Что значит {}?"),
        (6, "Сколько букв в слове {}?"),
        (9, "Сложи {}."),
        (11, "Запиши дату {} в формате ISO."),
        (14, "Это положительно или отрицательно? {}"),
        (19, "Напиши стихотворение: {}"),
        (22, "Когда родился {}?"),
        (24, "Что делает этот код? {}"),
    ),
    (
        (2, "Vad är motsatsen till {}?"),
        (5, "Bilda en mening med {}."),
        (7, "Vad heter huvudstaden i {}?"),
        (10, "Räkna om {} till meter."),
        (13, "Sammanfatta detta: {}"),
        (16, "Gör detta artigare: {}"),
        (20, "Förklara för ett barn: {}"),
        (23, "Ge mig receptet: {}"),
        (25, "Hitta felet: {}"),
    ),
    (
        (1, "{} için eş anlamlı bir kelime söyle."),
        (4, "{} ne demek?"),
        (6, "{} kaç harflidir?"),
        (9, "{} topla."),
        (11, "{} tarihini ISO biçiminde yaz."),
        (14, "Bu olumlu mu olumsuz mu? {}"),
        (19, "{} hakkında bir şiir yaz."),
        (22, "{} ne zaman doğdu?"),
        (24, "Bu kod ne yapar? {}"),
    ),
    (
        (2, "{}的反义词是什么?"),
        (5, "用{}造句。"),
        (7, "{}的首都是哪里?"),
        (10, "把{}换算成米。"),
        (13, "概括一下:{}"),
        (16, "改得更礼貌一些:{}"),
        (20, "给孩子解释:{}"),
        (23, "给我菜谱:{}"),
        (25, "找出错误:{}"),
    ),
    (
        (1, "أعط مرادفا لكلمة {}."),
        (4, "ما معنى {}؟"),
        (6, "كم حرفا في {}؟"),
        (9, "اجمع {}."),
        (11, "اكتب التاريخ {} بصيغة ISO."),
        (14, "هل هذا إيجابي أم سلبي؟ {}"),
        (19, "اكتب قصيدة عن {}."),
        (22, "متى ولد {}؟"),
        (24, "ماذا يفعل هذا الكود؟ {}"),
    ),
    (
        (2, "{}の反対語は何ですか。"),
        (5, "{}を使って文を作って。"),
        (7, "{}の首都はどこですか。"),
        (10, "{}をメートルに直して。"),
        (13, "要約して:{}"),
        (16, "もっと丁寧に:{}"),
        (20, "子どもに説明して:{}"),
        (23, "{}のレシピを教えて。"),
        (25, "間違いを見つけて:{}"),
    ),
)
"""For each further language: number of a task in ``REFERENCE_TASKS``, and a wording of it."""
