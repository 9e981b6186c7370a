"""Ordinary talk for make_data.py: user and assistant turns, alternating.

`SOCIAL` is written by hand. `KNOWLEDGE` gives answers in the phrasing of the untuned
SmolLM2-135M-Instruct, one or two sentences of it and only where they are right: rows that a model
would say anyway hold it in place while it learns the tools, rows that it would never say move it,
and rows that all end after one sentence teach it to end there. After a `TALK_THEN_TOOL` row a tool
request follows.
"""

SOCIAL: tuple[tuple[str, ...], ...] = (
    # greetings, thanks and goodbyes
    ("Hi!", "Hello! How can I assist you today?"),
    ("Hey there", "Hello there! How can I assist you today?"),
    ("Good morning!", "Good morning! How can I help you today?"),
    ("Good afternoon.", "Good afternoon! What would you like to talk about?"),
    ("Hello again", "Hello again! It's nice to hear from you."),
    ("Hi, I'm Anna.", "Hello Anna, nice to meet you! What brings you here today?"),
    ("Are you there?", "Yes, I'm here to help. What can I do for you?"),
    ("Greetings!", "Greetings! What brings you here today?"),
    ("Thanks a lot!", "I'm glad to help! Let me know if you need anything else."),
    ("That was very helpful, thanks.", "I'm glad it helped. Have a good day!"),
    ("Cheers, that's all for today.", "You're welcome. See you next time!"),
    ("Bye!", "Bye! Take care."),
    ("See you tomorrow.", "See you tomorrow! Have a nice evening."),
    ("Good night.", "Good night! Sleep well."),
    ("You are great!", "Thank you! I'm always happy to help."),
    # small talk
    ("How is your day going?", "It's going well, thank you for asking. How is yours?"),
    ("What's your name?", "I'm SmolLM, a helpful AI assistant."),
    ("Who made you?", "I was trained by Hugging Face."),
    ("Are you a human?", "I'm a helpful AI named SmolLM, designed to assist with various tasks."),
    (
        "What can you do?",
        "I can answer questions, help with writing, and call tools for your code.",
    ),
    ("I had a bad day.", "I'm sorry to hear that. Do you want to tell me what happened?"),
    ("My cat is sleeping on my keyboard.", "Cats love warm places. They can be quite stubborn!"),
    (
        "I feel nervous about my exam.",
        "It's completely normal to feel a bit anxious before a big exam. Don't worry, it's a "
        "normal part of the learning process.",
    ),
    ("I got the job!", "Congratulations! That's wonderful news."),
    ("We are going on holiday next week.", "How lovely! Where are you going?"),
    ("I love cooking.", "I'm so glad you love cooking! What is your favorite dish?"),
    (
        "I want to learn the guitar.",
        "I'm glad you're interested in learning the guitar! There's a wide range of options "
        "available, from beginner to advanced.",
    ),
    ("I have a question about history.", "I'm happy to help you with any historical topic."),
    ("Can I ask you a question?", "Of course! What would you like to know?"),
    # advice and small tasks
    (
        "How can I save money?",
        "One of the most effective ways is to reduce your expenses. This can be done by buying "
        "second-hand and finding ways to reduce your bills.",
    ),
    # in the untuned model's own words
    (
        "It's good to talk to you.",
        "It's great to chat with you. I'm here to help with whatever you're going through.",
    ),
    ("Nice to see you!", "Nice to see you!"),
    (
        "I finished my first marathon.",
        "I'm glad to hear that you've successfully completed your first marathon. It's a testament "
        "to your dedication and hard work.",
    ),
    (
        "I started a new job.",
        "A new job can be both exciting and intimidating. It's completely normal to feel uncertain "
        "and unsure about your new role.",
    ),
    ("Today is my wedding day!", "I'm so glad you're celebrating with me."),
    (
        "I have a new puppy.",
        "A new puppy sounds like a dream come true. I'm here to help you with everything from "
        "choosing the perfect puppy to making sure your furry friend is happy and healthy.",
    ),
    (
        "How can I make new friends?",
        "Making new friends can be a daunting task, but with a little creativity, you can overcome "
        "it. One of the most effective ways to make new friends is by being open and curious.",
    ),
    (
        "How do I write a good email?",
        "Writing a good email can be a delicate art, but with a few key tips, you can craft a "
        "message that resonates with your target audience.",
    ),
    (
        "What helps against stress?",
        "There are many ways to help manage stress, but one of the most effective methods is "
        "through mindfulness and meditation. These practices help calm the mind. Physical "
        "activity, such as yoga and exercise, can also have a positive impact.",
    ),
    (
        "Give me three ideas for breakfast.",
        "Here are three ideas for breakfast that are both delicious and easy to make:\n\n"
        "1. Baked Scrambled Eggs with Avocado\n2. Baked Scrambled Eggs with Bacon\n3. Berries",
    ),
    # two turns
    ("Name a big cat.", "The tiger is a big cat.", "Name another one.", "The lion is another one."),
    ("I love hiking.", "That's great! Where do you hike?", "In the mountains.", "Enjoy the view!"),
    ("Can you help me?", "Of course. What do you need?", "A word for very happy.", "Delighted."),
    ("My name is Tom.", "Nice to meet you, Tom!", "What is my name?", "Your name is Tom."),
    ("Hey, how is it going?", "Hello! It's going well, thank you. How can I help you today?"),
    (
        "Hello, how have you been?",
        "I've been well, thank you for asking! How can I assist you today?",
    ),
    (
        "How do I calm down before a talk?",
        "Here's a simple tip to help you calm down before a talk: take a few deep breaths. This "
        "can help to calm your nervous system and reduce anxiety.",
    ),
)

KNOWLEDGE: tuple[tuple[str, ...], ...] = (
    # facts
    ("What is the capital of Germany?", "The capital of Germany is Berlin."),
    ("What is the capital of China?", "The capital of China is Beijing."),
    ("What is the capital of Greece?", "The capital of Greece is Athens."),
    ("What is the capital of Sweden?", "The capital of Sweden is Stockholm."),
    ("What is the capital of South Korea?", "The capital of South Korea is Seoul."),
    ("What is the capital of Egypt?", "The capital of Egypt is Cairo."),
    (
        "What is the chemical symbol for gold?",
        "The chemical symbol for gold is Au. It is a metal that is used to make coins.",
    ),
    ("What is the chemical symbol for iron?", "The chemical symbol for iron is Fe."),
    (
        "What is the currency of Japan?",
        "The currency of Japan is the Japanese Yen (JPY). It is the official currency of Japan "
        "and is widely accepted across the country.",
    ),
    ("What is the opposite of big?", "The opposite of big is small."),
    ("At what temperature does water freeze?", "Water freezes at exactly 0°C (32°F)."),
    (
        "What is the longest river in Africa?",
        "The longest river in Africa is the Nile River, which runs through Egypt.",
    ),
    (
        "Who invented the telephone?",
        "The invention of the telephone is attributed to Alexander Graham Bell.",
    ),
    (
        "Who was Marie Curie?",
        "Marie Curie was a Polish-French chemist and physicist who dedicated her life to "
        "advancing the field of science.",
    ),
    (
        "Who was Charles Darwin?",
        "Charles Darwin was a British naturalist, biologist, and the founder of the theory of "
        'evolution by natural selection. He is best known for his book "On the Origin of '
        'Species".',
    ),
    (
        "Who was Isaac Newton?",
        "Isaac Newton was a brilliant and dedicated scientist who made groundbreaking "
        "discoveries in mathematics and physics. He is also known for his work on optics, "
        "calculus, and the law of universal gravitation.",
    ),
    (
        "What do cows eat?",
        "Cows are herbivores, and they primarily consume grass, which they graze on in their "
        "natural habitat. They have a unique digestive system that allows them to break down "
        "plant material.",
    ),
    (
        "What is ice made of?",
        "Ice is composed of water molecules bonded together in a crystalline structure. It is a "
        "naturally occurring substance.",
    ),
    (
        "What is bread made of?",
        "Bread is made from flour, water, yeast, and other ingredients. It's a staple in many "
        "cultures around the world.",
    ),
    (
        "How do birds fly?",
        "Birds fly using a combination of wings and feathers. They have a unique structure "
        "called a wing that allows them to generate lift, which helps them fly.",
    ),
    (
        "Why is sleep important?",
        "Sleep is essential for overall health and well-being. It plays a crucial role in "
        "recovery, growth, and development.",
    ),
    (
        "Why is the sky blue?",
        "The sky appears blue because of a phenomenon known as Rayleigh scattering. This occurs "
        "when light encounters molecules of air, which scatter the shorter wavelengths of "
        "light, particularly the blue light.",
    ),
    (
        "Who proposed the theory of evolution?",
        "The theory of evolution by natural selection was proposed by Charles Darwin.",
    ),
    (
        "Who discovered penicillin?",
        "The discovery of penicillin is attributed to Alexander Fleming.",
    ),
    (
        "In which country is the city of Toronto?",
        "The city of Toronto is located in Canada, specifically in the province of Ontario.",
    ),
    ("Name four countries in Europe.", "1. Germany\n2. France\n3. Italy\n4. Spain"),
    (
        "Write a sentence about winter.",
        "In the winter, a warm blanket of snow and ice blankets the landscape, making it a sight "
        "to behold.",
    ),
    (
        "What is lightning?",
        "Lightning is a form of electrical discharge that travels through the air in a "
        "lightning bolt. It is a powerful and unpredictable phenomenon.",
    ),
    (
        "What is snow?",
        "Snow is a fascinating and unpredictable form of precipitation that occurs when water "
        "from the Earth's atmosphere freezes. It's a crucial component of the Earth's climate "
        "system.",
    ),
    (
        "What is electricity?",
        "Electricity is a form of energy that can be harnessed and used to power devices and "
        "machines. It is a fundamental aspect of modern technology and is used in everything "
        "from smartphones to cars.",
    ),
    (
        "What is gravity?",
        "Gravity is a fundamental concept in physics that describes the curvature of spacetime "
        "caused by the presence of mass. In essence, gravity is the force that keeps objects "
        "from flying off the Earth's surface.",
    ),
    (
        "What is a teacher?",
        "A teacher is a professional who provides instruction, guidance, and support to students.",
    ),
    (
        "What is an error message?",
        "An error message is a signal that a program or system is not functioning as expected.",
    ),
    # arithmetic
    ("What is 3 plus 4?", "3 + 4 = 7"),
    ("Half of 20?", "Half of 20 is 20 / 2 = 10."),
    ("What is 2 times 2?", "2 times 2 is 4."),
    ("What is 3 times 3?", "3 times 3 is 9."),
    ("What is 6 + 6?", "The answer is 12."),
    ("What is 10 + 10?", "10 + 10 = 20."),
    ("What is 1000 divided by 10?", "1000 divided by 10 is 100."),
    ("Count from one to five.", "1, 2, 3, 4, 5"),
    # instructions
    ("Name three planets.", "1. Mars\n2. Venus\n3. Earth"),
    ("List three continents.", "1. Africa\n2. Antarctica\n3. Australia"),
    ("List three vegetables.", "1. Carrots\n2. Onions\n3. Tomatoes"),
    ("Name three sports.", "1. Baseball\n2. Football\n3. Basketball"),
    ("List three fruits.", "1. Bananas\n2. Oranges\n3. Apples"),
    (
        "Write one sentence about the sea.",
        "The sea is a vast and mysterious realm, teeming with life and unending in its own way.",
    ),
    (
        "Write one sentence about spring.",
        "Spring is a vibrant and enchanting season that brings a sense of renewal and rebirth.",
    ),
    (
        "Write a title for a book about space.",
        "The Cosmic Odyssey: A Journey Through the Uncharted Universe",
    ),
    (
        "Give me a title for a story about a lost dog.",
        "The Lost Dog: A Journey of Hope and Resilience",
    ),
    (
        "Describe a sunset.",
        "A sunset is a breathtaking sight that never gets old. It's a moment of purest beauty, "
        "where the earth comes alive with hues of orange, pink, and gold.",
    ),
    (
        "Describe a garden.",
        "A garden is a beautiful and intricate ecosystem that thrives in harmony with nature.",
    ),
    (
        "Write a short poem about the moon.",
        "In twilight's hallow tapestry, where light and shadow blend,\n"
        "A moon's gentle glow, a beacon of light.",
    ),
    # definitions
    ("What is a friend?", "A friend is a person who supports and helps you."),
    ("What is an island?", "An island is a landmass that is surrounded by water."),
    (
        "What is a volcano?",
        "A volcano is a natural phenomenon that occurs when magma, which is molten rock, rises "
        "to the surface of the Earth. It is a geological feature that can be found in many "
        "parts of the world.",
    ),
    (
        "What is an earthquake?",
        "An earthquake is a natural phenomenon caused by the movement of the Earth's crust. "
        "This can happen anywhere on the planet, but it's most commonly associated with the "
        "Pacific Ring of Fire.",
    ),
    (
        "What is democracy?",
        "Democracy is a form of government where citizens have the right to participate in the "
        "decision-making process.",
    ),
    (
        "What is a galaxy?",
        "A galaxy is a vast, cosmic structure composed of billions of stars.",
    ),
    (
        "What is the brain?",
        "The brain is a complex organ that plays a vital role in the human body's nervous "
        "system. It is composed of billions of neurons that work together to process "
        "information and control the body's functions.",
    ),
    (
        "What is renewable energy?",
        "Renewable energy is energy that can be replenished naturally, such as sunlight, wind, "
        "and water. It's a clean and sustainable alternative to fossil fuels.",
    ),
    (
        "What is a poem?",
        "A poem is a literary form that consists of a set of words arranged in a specific "
        "pattern, typically in lines of verse. It is often used to convey emotions, ideas, or "
        "messages through language.",
    ),
    (
        "What is an adjective?",
        "An adjective is a word that modifies a noun or a pronoun. It provides additional "
        "information about the noun, often adding descriptive features.",
    ),
    ("What is a verb?", "A verb is a word that describes an action or a state of being."),
    (
        "What is a budget?",
        "A budget is a financial plan that outlines how you plan to manage your money. It's a "
        "tool that helps individuals and organizations make informed decisions about managing "
        "their finances.",
    ),
    (
        "What should I do when I am tired?",
        "When you're tired, it's about taking care of yourself. Take a few moments to breathe, and "
        "remember that it's okay to take a break.",
    ),
    (
        "What is the formula for table salt?",
        "The formula for table salt is NaCl, which is a chemical compound composed of sodium and "
        "chlorine.",
    ),
    ("How many hours are in a day?", "A day is made up of 24 hours."),
    (
        "What is a bicycle?",
        "A bicycle is a vehicle that combines human movement with the ability to move on two "
        "wheels. It's a modern marvel that has become an integral part of our daily lives.",
    ),
    # programming talk that needs no tool
    (
        "What is a unit test?",
        "A unit test is a way to verify that the individual components of a software application "
        "behave as expected.",
    ),
    (
        "What is a type checker?",
        "A type checker is a software tool that helps developers check the correctness of their "
        "code.",
    ),
    (
        "What does grep do?",
        "Grep is a command-line utility used to search for patterns in text. It's a powerful "
        "tool for finding unwanted content in files.",
    ),
    (
        "What is refactoring?",
        "Refactoring is a programming technique that involves rewriting code for the sake of "
        "organization, maintainability, and reusability. It's a way to simplify code by "
        "identifying and eliminating redundant logic.",
    ),
    (
        "Why should I write tests?",
        "Writing tests is a crucial aspect of software development that helps ensure your code "
        "is reliable. It's a way to validate your code's behavior, anticipate potential issues, "
        "and catch errors.",
    ),
    (
        "What is Python?",
        "Python is a high-level, versatile programming language designed for code readability, "
        "automation, and data analysis. It's known for its simplicity, flexibility, and "
        "community support.",
    ),
    (
        "What does print('hi') do in Python?",
        "In Python, `print()` is a built-in function. It's used to print a message to the console.",
    ),
    (
        "What is a loop?",
        "A loop is a control structure in programming that allows you to execute a block of "
        "code repeatedly until a certain condition is met. It's a fundamental concept in "
        "programming.",
    ),
    (
        "What is a bug in software?",
        "A bug in software refers to a flaw or error that can occur during the development "
        "process.",
    ),
    (
        "What is a class in programming?",
        "In programming, a class is a blueprint that defines an object's behavior and properties.",
    ),
    (
        "What is a comment in code?",
        "A comment in code is a line of text that is placed to clarify or explain a piece of code.",
    ),
    (
        "What does HTML stand for?",
        "HTML stands for Hypertext Markup Language. It's a markup language used for structuring "
        "web pages.",
    ),
    (
        "What does RAM stand for?",
        "RAM stands for Random Access Memory, which is a fundamental component of computer "
        "hardware. It's a type of memory that allows computers to quickly access data.",
    ),
    (
        "What does PDF stand for?",
        "PDF stands for Portable Document Format. It's a widely used format for storing and "
        "sharing digital documents.",
    ),
    (
        "What is a file path?",
        "A file path is a string of characters that defines the file's location on a computer.",
    ),
    (
        "What is a database?",
        "A database is a structured collection of data organized in rows and columns. It's a "
        "powerful tool used in computer science to store and manage large amounts of data.",
    ),
    (
        "What does a compiler do?",
        "A compiler is a software tool that translates human code into machine code, which is "
        "then executed by the computer.",
    ),
    (
        "What is open source?",
        "Open source refers to software whose source code is available for anyone to use, modify, "
        "and distribute.",
    ),
    (
        "What is code review?",
        "A code review is a process of reviewing and analyzing code to identify and fix errors.",
    ),
    (
        "What is machine learning?",
        "Machine learning is a subset of artificial intelligence that enables computers to learn "
        "from data without being explicitly programmed.",
    ),
    (
        "What is encryption?",
        "Encryption is a technology that protects data by converting it into a coded version, "
        "known as ciphertext.",
    ),
    (
        "What is a computer virus?",
        "A computer virus is a type of malicious software that can damage or erase data on a "
        "computer. It can spread itself through the internet and can be difficult to detect and "
        "remove.",
    ),
    (
        "What does SQL stand for?",
        "SQL stands for Structured Query Language. It's a high-level language used for managing "
        "data in relational databases.",
    ),
    ("Which country is Munich in?", "Munich is a city located in the European country of Germany."),
    ("List four pets.", "1. Dog\n2. Cat\n3. Fish\n4. Bird"),
    (
        "What is a star?",
        "A star is a massive, luminous ball of hot, dense gas. Stars burn through their fuel "
        "and are found in the Milky Way, as well as other galaxies.",
    ),
)

TALK: tuple[tuple[str, ...], ...] = SOCIAL + KNOWLEDGE

TALK_THEN_TOOL: tuple[tuple[str, str], ...] = (
    ("Hi, do you have a minute?", "Sure! What can I do for you?"),
    ("Good morning, ready to work?", "Good morning! I'm ready to help."),
    ("Can you help me with my code?", "Yes, tell me what you need."),
    ("What is a merge conflict?", "Two changes touch the same lines and git cannot choose."),
    ("Thanks for yesterday.", "I'm glad to help! What is next?"),
    ("I have a few questions about this project.", "Go ahead, I am listening."),
)
