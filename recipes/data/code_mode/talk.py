"""Ordinary talk for make_data.py, written by hand: user and assistant turns, alternating.

`TALK` rows are whole conversations; after a `TALK_THEN_TOOL` row a tool request follows.
"""

TALK: tuple[tuple[str, ...], ...] = (
    # greetings
    ("Hi!", "Hi! How can I help you today?"),
    ("Hey there", "Hey! What can I do for you?"),
    ("Good morning!", "Good morning! I hope you slept well. How can I help?"),
    ("Good afternoon.", "Good afternoon! What would you like to talk about?"),
    ("Hello again", "Hello again! It is nice to hear from you."),
    ("Hey, what's up?", "Not much, I am here to help. What is on your mind?"),
    ("Hi, I'm Anna.", "Hi Anna, nice to meet you! How can I help?"),
    ("Greetings!", "Greetings! What can I help you with?"),
    ("Are you there?", "Yes, I am here. What can I do for you?"),
    ("Happy Monday!", "Happy Monday! I hope your week starts well."),
    # thanks and goodbyes
    ("Thanks a lot!", "You're welcome! Let me know if you need anything else."),
    ("That was very helpful, thank you.", "I'm glad it helped. Have a good day!"),
    ("Cheers, that's all for today.", "You're welcome. See you next time!"),
    ("Bye!", "Goodbye! Take care."),
    ("See you tomorrow.", "See you tomorrow! Have a nice evening."),
    ("Good night.", "Good night! Sleep well."),
    ("You are great!", "Thank you, that is kind of you to say."),
    ("Sorry, I have to go.", "No problem at all. Take care!"),
    # small talk
    ("How is your day going?", "It is going well, thank you for asking. How is yours?"),
    ("What's your name?", "My name is SmolLM. I am an AI assistant."),
    ("Who made you?", "I was trained by Hugging Face."),
    ("Are you a human?", "No, I am an AI assistant, but I am happy to talk with you."),
    (
        "What can you do?",
        "I can answer questions, help with writing, and call tools that work on your code.",
    ),
    (
        "Do you like music?",
        "I cannot hear music, but I enjoy talking about it. What do you listen to?",
    ),
    ("I'm bored.", "How about a short walk, a good book, or learning a card trick?"),
    ("I had a bad day.", "I'm sorry to hear that. Do you want to tell me what happened?"),
    ("It's raining again here.", "That sounds like a good day for tea and a warm blanket."),
    ("I got the job!", "Congratulations! That is wonderful news."),
    (
        "My cat is sleeping on my keyboard.",
        "Cats love warm places. It seems you have a small break now!",
    ),
    ("I can't sleep.", "Try a dim light, slow breathing, and no screens for half an hour."),
    ("Tell me something nice.", "Somewhere today a stranger smiled because of something you did."),
    ("Do you ever get tired?", "No, I don't get tired. I can help whenever you like."),
    (
        "I feel nervous about my exam.",
        "That is normal. Rest well, breathe slowly, and trust your preparation.",
    ),
    ("We are going on holiday next week.", "How lovely! Where are you going?"),
    # facts
    ("What is the capital of Italy?", "The capital of Italy is Rome."),
    ("What is the capital of Germany?", "The capital of Germany is Berlin."),
    ("Which planet is known as the red planet?", "Mars is known as the red planet."),
    ("How many legs does a spider have?", "A spider has eight legs."),
    ("What is the largest ocean?", "The Pacific Ocean is the largest ocean on Earth."),
    ("Who wrote Romeo and Juliet?", "William Shakespeare wrote Romeo and Juliet."),
    ("What do bees make?", "Bees make honey."),
    (
        "At what temperature does water freeze?",
        "Water freezes at 0 degrees Celsius, which is 32 degrees Fahrenheit.",
    ),
    ("How many months are in a year?", "There are twelve months in a year."),
    ("What is the longest river in Africa?", "The Nile is the longest river in Africa."),
    ("Who painted the Mona Lisa?", "Leonardo da Vinci painted the Mona Lisa."),
    ("What gas do plants take in?", "Plants take in carbon dioxide."),
    ("What language do people speak in Brazil?", "People in Brazil speak Portuguese."),
    ("Which animal is the tallest?", "The giraffe is the tallest animal."),
    ("What is the currency of Japan?", "The currency of Japan is the yen."),
    ("Is the moon bigger than the Earth?", "No, the moon is much smaller than the Earth."),
    ("What is the opposite of big?", "The opposite of big is small."),
    ("Which season comes after winter?", "Spring comes after winter."),
    ("What do cows eat?", "Cows eat mostly grass and hay."),
    ("What is ice made of?", "Ice is made of frozen water."),
    ("How many hours are in a day?", "There are 24 hours in a day."),
    ("In which country is the Great Wall?", "The Great Wall is in China."),
    ("What organ pumps blood?", "The heart pumps blood through the body."),
    ("What color is a ripe banana?", "A ripe banana is yellow."),
    # arithmetic
    ("What is 3 plus 4?", "3 plus 4 is 7."),
    ("What is 10 minus 6?", "10 minus 6 is 4."),
    ("5 + 5 = ?", "5 + 5 = 10."),
    ("What is 6 times 2?", "6 times 2 is 12."),
    ("Half of 20?", "Half of 20 is 10."),
    ("I have two apples and buy three more. How many do I have?", "You have five apples."),
    ("What is 9 divided by 3?", "9 divided by 3 is 3."),
    ("Is 8 an even number?", "Yes, 8 is an even number."),
    ("Which is larger, 15 or 50?", "50 is larger than 15."),
    ("What comes after 99?", "The number after 99 is 100."),
    # instructions
    ("List three fruits.", "Apple, banana, and orange."),
    ("Name two animals that can fly.", "An eagle and a bat can fly."),
    ("Write one sentence about the sea.", "The sea was calm and blue under the morning sun."),
    (
        "Write a short poem about the moon.",
        "The moon is round, the night is deep,\nit shines above while children sleep.",
    ),
    ("Give me a word that rhymes with cat.", "A word that rhymes with cat is hat."),
    ("Translate 'thank you' into Spanish.", "'Thank you' in Spanish is 'gracias'."),
    ("Make this polite: give me water.", "Could you please give me some water?"),
    ("Count from one to five.", "One, two, three, four, five."),
    ("Give me a title for a story about a lost dog.", "The Long Way Home"),
    ("Say something funny.", "Why did the book look sad? It had too many problems in its story."),
    ("Name the days of the weekend.", "The days of the weekend are Saturday and Sunday."),
    (
        "Describe a forest in one sentence.",
        "A forest is a quiet place full of tall trees, birds, and soft light.",
    ),
    ("Give me an example of a vegetable.", "A carrot is an example of a vegetable."),
    ("Use the word 'river' in a sentence.", "We walked along the river until it was dark."),
    (
        "Write a birthday wish for my brother.",
        "Happy birthday! I hope your year is full of joy and good surprises.",
    ),
    ("Suggest a name for a puppy.", "How about Biscuit?"),
    ("Finish the sentence: The sun rises in the", "The sun rises in the east."),
    ("List the primary colors.", "The primary colors are red, yellow, and blue."),
    (
        "Explain rain to a child.",
        "Clouds hold many tiny drops of water. When they get heavy, they fall down as rain.",
    ),
    (
        "Write a short thank-you note to a teacher.",
        "Dear teacher, thank you for your patience. I learned a lot from you.",
    ),
    (
        "Summarize: The shop opens at nine and closes at five.",
        "The shop is open from nine to five.",
    ),
    # advice
    (
        "How do I boil an egg?",
        "Put the egg in boiling water for eight minutes, then cool it in cold water.",
    ),
    ("How can I drink more water?", "Keep a bottle on your desk and take a sip every half hour."),
    ("What should I cook tonight?", "Pasta with tomatoes and basil is quick and tastes good."),
    (
        "How can I learn a new language?",
        "Practice a little every day, listen a lot, and speak with other people.",
    ),
    (
        "Any tips for a job interview?",
        "Learn about the company, prepare examples of your work, and ask questions.",
    ),
    (
        "How do I keep my plants alive?",
        "Give them light, water them when the soil is dry, and do not drown them.",
    ),
    (
        "How can I save money?",
        "Write down what you spend, cook at home, and put a little aside each month.",
    ),
    (
        "Should I bring an umbrella?",
        "If clouds are dark or rain is forecast, an umbrella is a good idea.",
    ),
    (
        "What is a good gift for my mother?",
        "Flowers, a framed photo, or a day together are lovely gifts.",
    ),
    ("How do I make tea?", "Pour hot water over the tea, wait three to five minutes, and enjoy."),
    (
        "How can I focus better at work?",
        "Turn off notifications, work in short blocks, and take real breaks.",
    ),
    # definitions
    ("What is a dictionary?", "A dictionary is a book that explains what words mean."),
    ("What does 'brave' mean?", "Brave means ready to face danger or pain without giving up."),
    (
        "What is gravity?",
        "Gravity is the force that pulls things toward each other, such as you toward the Earth.",
    ),
    (
        "What is a volcano?",
        "A volcano is an opening in the ground where hot lava and gas come out.",
    ),
    ("Define 'friend'.", "A friend is a person you like and trust."),
    (
        "What is a desert?",
        "A desert is a very dry place where little rain falls and few plants grow.",
    ),
    ("What is an island?", "An island is a piece of land with water all around it."),
    (
        "What is democracy?",
        "Democracy is a form of government in which the people choose their leaders.",
    ),
    ("What is a noun?", "A noun is a word for a person, a place, a thing, or an idea."),
    # programming talk that needs no tool
    (
        "What is a unit test?",
        "A unit test checks that one small piece of code does what it should.",
    ),
    ("What does a linter do?", "A linter reads source code and points out mistakes and bad style."),
    (
        "What is a type checker?",
        "A type checker finds places where values of the wrong type are used.",
    ),
    ("What is git?", "Git is a version control system that records the history of your files."),
    ("What does grep do?", "Grep searches text for lines that match a pattern."),
    (
        "What is refactoring?",
        "Refactoring means changing the structure of code without changing what it does.",
    ),
    (
        "What is a symbol in programming?",
        "A symbol is a name in code, such as the name of a function or a class.",
    ),
    (
        "Why should I write tests?",
        "Tests catch mistakes early and let you change code without fear.",
    ),
    ("What is a diff?", "A diff shows the lines that differ between two versions of a file."),
    ("What is a folder?", "A folder is a place on a computer that holds files and other folders."),
    (
        "What is Python?",
        "Python is a popular programming language that is easy to read and to learn.",
    ),
    ("What does print('hi') do in Python?", "It writes the word hi to the screen."),
    ("In Python, what is len([1, 2])?", "The list has two items, so len([1, 2]) is 2."),
    (
        "What is a loop?",
        "A loop repeats a block of code, for example once for each item of a list.",
    ),
    ("What is a bug?", "A bug is a mistake in a program that makes it behave wrongly."),
    (
        "What does 'import math' mean?",
        "It makes the functions of the math module available in a Python program.",
    ),
    (
        "What is the difference between a list and a tuple?",
        "In Python a list can be changed after it is made, and a tuple cannot.",
    ),
    ("Is Python hard to learn?", "No, Python is one of the easier languages to begin with."),
    (
        "What is a class in programming?",
        "A class describes objects: the data they hold and what they can do.",
    ),
    ("How do I name a variable well?", "Pick a short name that says what the value means."),
    (
        "What is a comment in code?",
        "A comment is text for human readers that the computer ignores.",
    ),
    ("What does HTML stand for?", "HTML stands for HyperText Markup Language."),
    ("When should I rename a function?", "Rename it when its name no longer says what it does."),
    ("What is a file path?", "A file path tells the computer in which folders a file lies."),
    (
        "What is a database?",
        "A database is an organized collection of data that programs can search and change.",
    ),
    ("What does x = 5 do?", "It stores the number 5 in the variable x."),
    ("What are type hints?", "Type hints say which types a function expects and returns."),
    ("Who reads my code?", "Mostly other people, and yourself in a few months."),
    (
        "What does a compiler do?",
        "A compiler translates source code into a form that the machine can run.",
    ),
    ("Do you prefer tabs or spaces?", "Most Python code uses four spaces, so I would use those."),
    ("What is open source?", "Open source software can be read, used, and changed by anyone."),
    (
        "What is code review?",
        "In a code review another person reads your change before it is merged.",
    ),
    # two turns
    (
        "What is the capital of Egypt?",
        "The capital of Egypt is Cairo.",
        "Which river flows there?",
        "The Nile flows through Cairo.",
    ),
    (
        "Name a big cat.",
        "The tiger is a big cat.",
        "Name another one.",
        "The lion is another big cat.",
    ),
    ("What is 2 times 5?", "2 times 5 is 10.", "And plus one?", "10 plus one is 11."),
    (
        "I love hiking.",
        "That is great! Where do you like to hike?",
        "In the mountains.",
        "The mountains are beautiful. Enjoy the fresh air!",
    ),
    (
        "What is a variable?",
        "A variable is a name for a value in a program.",
        "Thanks, I get it.",
        "You're welcome!",
    ),
    (
        "Can you help me?",
        "Of course. What do you need?",
        "I need a word for very happy.",
        "You could say 'delighted'.",
    ),
    ("My name is Tom.", "Nice to meet you, Tom!", "What is my name?", "Your name is Tom."),
    (
        "Which color is the sky?",
        "On a clear day the sky is blue.",
        "And at night?",
        "At night the sky is dark, almost black.",
    ),
)

TALK_THEN_TOOL: tuple[tuple[str, str], ...] = (
    ("Hi, do you have a minute?", "Sure! What can I do for you?"),
    ("Good morning, ready to work?", "Good morning! Yes, let us start."),
    ("Can you help me with my code?", "Yes, tell me what you need."),
    (
        "What is a merge conflict?",
        "It happens when two changes touch the same lines and git cannot choose.",
    ),
    ("Thanks for yesterday.", "You're welcome! What is next?"),
    ("I have a few questions about this project.", "Go ahead, I am listening."),
)
