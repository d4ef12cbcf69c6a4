"""Texts to tune and judge with when the caller gives none.

Everyday prose, dialogue, instructions, code, tables and other languages, all written for this purpose.
"""

from __future__ import annotations

TEXTS: tuple[str, ...] = (
    # nature and science
    "The harbour freezes from the edges inward. First a grey skin forms between the moored boats, thin enough that "
    "the wake of a duck can break it, and then, after two or three still nights, the skin thickens and begins to "
    "complain. People who live near the quay learn to read these sounds. A long rising whistle means the sheet is "
    "growing; a dull thud means it has cracked somewhere far out. By the end of January the ferry stops, and the "
    "children walk to school across the water, following a line of spruce branches that the harbour master sets out "
    "every morning.",
    "Honeybees keep the brood nest within a degree or so of thirty-five Celsius, summer and winter. When it is too "
    "warm, some workers spread drops of water over the comb while others stand at the entrance and fan, so that "
    "evaporation carries the heat away. When it is too cold, they unhook their wings from their flight muscles and "
    "shiver, burning honey to make heat. No single bee measures the temperature of the colony. Each reacts to its "
    "own small neighbourhood, and because their thresholds differ, the response grows smoothly instead of switching "
    "on and off.",
    "A star like the Sun spends most of its life in balance. Gravity pulls the gas inward, the pressure of the hot "
    "core pushes outward, and the energy lost at the surface is replaced by fusing hydrogen into helium. The "
    "balance corrects itself: if the core is squeezed a little, it heats up, fusion runs faster, and the extra "
    "pressure pushes it back. Only when the hydrogen in the centre is exhausted does this thermostat fail. The core "
    "then contracts, the outer layers swell a hundredfold, and the star becomes a red giant.",
    "Granite and basalt are both made by cooling magma, yet they look nothing alike. Granite cools slowly, "
    "kilometres below the ground, so that its crystals have thousands of years to grow; you can see the pink "
    "feldspar, the glassy quartz and the black flakes of mica with the naked eye. Basalt pours out at the surface "
    "and sets within days. Its crystals are too small to see, and the rock is dark because it holds more iron and "
    "magnesium. The ocean floor is basalt nearly everywhere, while granite forms the roots of the continents.",
    "To test whether the new fertiliser works, the researchers divided the field into sixty plots and gave it to "
    "thirty of them, chosen by lot. At harvest the treated plots yielded 4.8 tonnes per hectare on average and the "
    "others 4.5. That difference alone says little, because plots differ for many reasons: shade, drainage, the "
    "patience of local pigeons. What matters is how large a difference chance could have produced. Shuffling the "
    "labels ten thousand times gave a gap of 0.3 tonnes or more in only two hundred of the shuffles, so chance is "
    "an unlikely explanation.",
    "Salt lowers the freezing point of water because it makes the liquid state more favourable. In pure water at "
    "zero degrees, molecules leave the ice and join it at equal rates. Dissolved ions dilute the water, so fewer "
    "molecules hit the ice surface each second, while those in the ice leave as before. The ice shrinks until the "
    "temperature has fallen far enough to slow the melting down. This is why grit and brine clear a road at minus "
    "five, and why the same treatment is useless on a night of minus twenty-five.",
    # history and society
    "In 1851 the builders of the Crystal Palace had nine months to cover seven hectares of Hyde Park. They managed "
    "because almost every part was the same. Iron columns, girders and gutters were cast to a single grid of "
    "twenty-four feet, tested on arrival, and bolted together within hours; glaziers rode along the gutters on "
    "small trolleys and fitted eighteen thousand panes in a week. When the exhibition closed, the whole building "
    "was taken apart and put up again on a hill in south London. Critics could not agree whether it was "
    "architecture at all.",
    "The market council meets on the first Tuesday of the month in the room above the pharmacy. Its business is "
    "seldom dramatic: who may put a stall under the arcade, how early the vans may arrive, what to do about the "
    "fountain that leaks onto the flower sellers. Yet the minutes, kept in the same green ledgers since 1923, tell "
    "the story of the town better than any monument. In the wet autumn of 1947 the members voted to let farmers pay "
    "their fees in potatoes. In 1968 they refused, by one vote, to allow music.",
    "Double-entry bookkeeping spread from the trading cities of northern Italy because it caught mistakes. Every "
    "transaction was written twice, once as a debit and once as a credit, and at the end of the month the two "
    "columns had to agree. If they did not, something had been forgotten or invented. The method cost time and "
    "paper, and a merchant with a single shop had little use for it. But a house with partners in Bruges, ships at "
    "sea and loans falling due in three currencies could not be run from memory.",
    "When the railway reached the valley, noon became a matter of dispute. Until then each village had set its "
    "clock by the sun, and no one had minded that the church in the upper parish rang eleven minutes after the one "
    "by the mill. The timetable allowed no such freedom. For several years the station kept two clocks, one with "
    "railway time and one with local time, and farmers who missed the milk train wrote angry letters about the "
    "first. The second clock was taken down in 1883, quietly, during the hay harvest.",
    "A constitution does two different jobs. It sets out who may decide what, so that power changes hands without a "
    "fight, and it places some decisions out of reach of whoever holds power at the moment. The two jobs pull in "
    "different directions. Rules that are easy to change invite the majority of the day to remove whatever hinders "
    "it; rules that can hardly be changed leave the living bound by the opinions of the dead. Most countries settle "
    "somewhere between the two, with courts to argue about where exactly the line was drawn.",
    # everyday life and instructions
    "For the dough, stir 500 grams of flour, 10 grams of salt and 3 grams of dry yeast together, add 350 grams of "
    "lukewarm water and mix until no dry flour is left. Do not knead yet. Let the bowl stand for half an hour, then "
    "fold the dough over itself four times, turning the bowl a quarter after each fold. Repeat twice at intervals "
    "of thirty minutes. Shape a loose ball, leave it in a floured basket overnight in the refrigerator, and bake it "
    "the next morning in a closed iron pot at 240 degrees for 40 minutes.",
    "Before you call a plumber, find out where the water comes from. Dry everything under the sink with a cloth, "
    "lay down a sheet of newspaper and wait ten minutes without using the tap. If the paper stays dry, the leak is "
    "in the drain: run water and watch the joints of the trap. If it becomes wet, the supply is leaking, usually at "
    "the nut where the flexible hose meets the valve. Close the valve, unscrew the nut, replace the rubber washer, "
    "and tighten it by hand and then a quarter of a turn with a wrench, not more.",
    "Dear Ms Okafor, thank you for your order of 14 March. Unfortunately two of the six chairs arrived with "
    "scratches on the backrest, as the enclosed photographs show. I would prefer to have these two replaced rather "
    "than refunded, since the set is meant for a dining room that opens in three weeks. Could you let me know "
    "whether the same finish is still in stock, and whether your carrier can collect the damaged chairs when the "
    "new ones are delivered? I can be reached in the mornings under the number below. Kind regards, Tomas Lindqvist",
    "Hi team, a quick summary of where we stand. The new checkout page went live for ten percent of visitors on "
    "Monday. Conversion is up by about two points, but the numbers for mobile are still too small to trust. We "
    "found one real problem: on older phones the address form loses what was typed when the keyboard closes. Priya "
    "has a fix in review. If nothing else turns up by Thursday, I suggest we go to fifty percent over the weekend "
    "and decide on Monday. Please shout if you see a reason to wait.",
    "The night train leaves from platform nine at 22.40 and arrives at 7.15, though it is wise to expect eight. "
    "Compartments have four or six beds; the lower ones are easier to get into, the upper ones warmer and quieter. "
    "Bring water, because the dining car closes at midnight, and a scarf, because the heating knows only two "
    "settings. A conductor takes your ticket in the evening and returns it with a cup of coffee half an hour before "
    "your stop. If you cross the border, keep your passport within reach of your hand.",
    "Learning to sing in tune is mostly learning to listen. Begin with a note in the middle of your range, played "
    "on a piano or an app, and hum it softly. If you hear a slow beating between your voice and the note, you are "
    "close but not there; slide up or down until the beating disappears. Do this for five minutes a day before you "
    "try any songs. After a few weeks, sing the third and the fifth above the note that sounds. Loudness can wait: "
    "a quiet voice that is exactly in place carries farther than a loud one beside it.",
    "Our flat is on the fourth floor, there is no lift, and the sofa is two metres and ten long. We measured the "
    "stairwell three times. My brother-in-law, who once moved pianos, said that it would go if we stood it on end "
    "at every landing and turned it like a key. We got as far as the second floor before the neighbour's bicycle "
    "stopped us. Then it rained. In the end a man from the shop below lent us his rope, and the sofa came in "
    "through the balcony door, watched by half of the street.",
    # fiction and dialogue
    "The lighthouse keeper's daughter had never seen a tree taller than herself. She knew them from books, where "
    "they stood about in crowds, and she had concluded that forests must be terribly loud. When the supply boat "
    "finally took her to the mainland, in the summer she turned twelve, she asked to be driven to one. The driver "
    "stopped at the edge of a beech wood and switched off the engine. She got out, walked in as far as the first "
    'bend of the path, and stood still. After a while she came back. "It is listening," she said.',
    '"You are late," said the clockmaker without looking up. "I am exactly on time," said the visitor, and laid a '
    "watch on the bench. It was thin and old, and it ran backwards. The clockmaker opened the case, bent over the "
    'movement, and was silent for so long that the visitor began to count the pendulums on the wall. "Nothing is '
    'wrong with it," he said finally. "Every wheel is where it should be." "That is what the others told me," said '
    'the visitor. "I was hoping that you would be the first to ask what it is counting down to."',
    "Interviewer: What made you leave the orchestra after nineteen seasons? Cellist: My left hand, mostly. It began "
    "to tremble in slow passages, and slow passages are where you are paid to be calm. Interviewer: And now you "
    "build instruments. Cellist: I build one a year, badly. The man who teaches me says that the first ten are for "
    "the stove. Interviewer: How many have you finished? Cellist: Six. Interviewer: Where are they? Cellist: In "
    "use. Students borrow them. They don't know about the stove, so please don't print that.",
    "Nobody in the office admitted to feeding the cat, and yet the cat grew. It slept on the warm lid of the "
    "copier, attended meetings, and once deleted half of a spreadsheet by sitting down. Management sent a message "
    "about hygiene. The next morning someone had taped a small badge to the copier with the words Quality Assurance "
    "and a photograph. By Friday the badge had a lanyard. When the inspectors came in spring, they noted three "
    "loose cables, one blocked fire door, and an employee on the fourth floor who did not respond to questions.",
    # question and answer, explanation
    "Question: Why is the sky blue but the sunset red? Answer: Air scatters short wavelengths far more than long "
    "ones; for molecules much smaller than the wavelength the effect grows with the fourth power of the frequency. "
    "When the sun is high, the blue part of its light is scattered towards us from every direction, and that is the "
    "colour of the sky. At sunset the light crosses perhaps forty times as much air. Nearly all of the blue has "
    "been scattered out of the beam on the way, and what remains and lights up the clouds is orange and red.",
    "Question: What is the difference between a virus and a bacterium? Answer: A bacterium is a living cell. It has "
    "its own metabolism, makes its own proteins and divides by itself, and most kinds are harmless or useful. A "
    "virus is a piece of genetic material in a coat of protein. It does nothing until it enters a cell, whose "
    "machinery it then uses to make copies. That is why antibiotics, which attack the cell walls or ribosomes of "
    "bacteria, do nothing against a cold, and why vaccines, which prepare the immune system beforehand, matter so "
    "much for viral diseases.",
    "Question: A shop lowers a price by 20 percent and later raises it by 20 percent. Is the old price back? "
    "Answer: No. Let the old price be 100. After the reduction it is 80. The increase is 20 percent of 80, which is "
    "16, so the new price is 96. In general a factor of 0.8 followed by a factor of 1.2 gives 0.96, and the order "
    "does not matter. To get back to 100 from 80, the shop would have to raise the price by 25 percent, because 80 "
    "times 1.25 is 100.",
    "Summarise the following report in two sentences. The bridge inspection of 3 May found no damage to the main "
    "cables. Eleven of 240 hangers show corrosion at the lower clamp, which was expected after the last winters and "
    "does not limit the load. The expansion joint on the northern side has lost two bolts and should be repaired "
    "before autumn. The coating of the pylons will last at least five more years. Summary: The bridge is safe, with "
    "the main cables sound and only minor corrosion on eleven hangers. The northern expansion joint needs a repair "
    "before autumn.",
    "Explain to a ten-year-old how a search engine works. Imagine a library with so many books that nobody could "
    "ever read all of them. Before anyone asks a question, thousands of very fast helpers run through the shelves "
    "and write down, for every word, in which books it appears. That list is called an index. When you ask for "
    "volcanoes and dinosaurs, the librarian does not read any books at all; she looks up both words in the index "
    "and picks the books that are on both lists. Then she sorts them, and puts those first that other good books "
    "mention often.",
    "List three advantages and three disadvantages of working from home. Advantages: 1. No commute, which saves "
    "time and money. 2. Fewer interruptions, so that long, difficult tasks are easier to finish. 3. More freedom to "
    "arrange the day around family or sport. Disadvantages: 1. Colleagues meet less by chance, and new employees "
    "find it harder to learn how things are done. 2. The border between work and leisure becomes blurred. 3. Not "
    "everyone has a quiet room, a good chair and a fast connection. Many companies therefore settle on two or three "
    "days a week.",
    # technology
    "A cache is a bet that the near future resembles the recent past. Keeping the last few thousand results in "
    "memory costs little, and if requests repeat, most of them never reach the database. The bet fails in two ways. "
    "Either the requests do not repeat, and then the cache is only one more thing to maintain; or the data changes "
    "underneath, and then it serves answers that used to be right. The first failure shows up in a graph of hit "
    "rates. The second shows up in a telephone call from a customer, which is why every entry should know when it "
    "expires.",
    "The outage began at 09.12 when a certificate expired on the internal load balancer. Health checks failed at "
    "once, and the scheduler did what it was told to do: it moved all jobs to the second site, which had half the "
    "capacity. By 09.20 queues there were growing by four hundred requests a second. Adding machines did not help, "
    "since each new machine asked the same balancer for its configuration. Service returned at 10.03, after the "
    "certificate was renewed by hand. We will alert thirty days ahead of expiry and limit how much traffic may move "
    "automatically.",
    "Memory on a modern processor is a hierarchy. A value in a register is available at once, one in the first "
    "cache after four or five cycles, one in the last cache after forty, and one in main memory after two or three "
    "hundred. Programs are fast when they use what they have loaded many times before it is pushed out. Multiplying "
    "two large matrices can be arranged in this way, by working on small square blocks. Multiplying a matrix by a "
    "single vector cannot: each element is needed exactly once, so the speed of the memory decides everything.",
    "To restore a backup, first stop the service so that nothing writes to the data directory. Copy the newest full "
    "archive and all later increments to a scratch disk, and verify their checksums before unpacking anything. "
    "Unpack the full archive, then apply the increments in the order of their dates; the tool refuses to continue "
    "when one is missing. Start the service in read-only mode, compare the number of records with the figure in the "
    "log, and only then allow writes. Rehearse this every quarter. A backup that has never been restored is a hope, "
    "not a backup.",
    "Version control changed how people write software less by storing old versions than by making it cheap to "
    "disagree. On a branch, two people can try incompatible ideas at the same time without asking anybody's "
    "permission. When the ideas are finished, they are compared in the open, line by line, and the argument is "
    "about code rather than about plans. Most branches are merged within days. Some are abandoned, and that is a "
    "success as well: it cost little to find out that the idea was wrong, and the reason is written down where the "
    "next person will look.",
    # code and data
    "def merge(left: list[int], right: list[int]) -> list[int]:\n"
    '    """Merge two sorted lists into one sorted list."""\n'
    "    result = []\n"
    "    i = j = 0\n"
    "    while i < len(left) and j < len(right):\n"
    "        if left[i] <= right[j]:\n"
    "            result.append(left[i])\n"
    "            i += 1\n"
    "        else:\n"
    "            result.append(right[j])\n"
    "            j += 1\n"
    "    result.extend(left[i:])\n"
    "    result.extend(right[j:])\n"
    "    return result\n",
    "class Stack:\n"
    "    def __init__(self, capacity):\n"
    "        self.capacity = capacity\n"
    "        self.items = []\n"
    "\n"
    "    def push(self, item):\n"
    "        if len(self.items) >= self.capacity:\n"
    '            raise OverflowError("stack is full")\n'
    "        self.items.append(item)\n"
    "\n"
    "    def pop(self):\n"
    "        if not self.items:\n"
    '            raise IndexError("stack is empty")\n'
    "        return self.items.pop()\n"
    "\n"
    "    def __len__(self):\n"
    "        return len(self.items)\n",
    "SELECT c.name, COUNT(o.id) AS orders, SUM(o.total) AS revenue\n"
    "FROM customers AS c\n"
    "LEFT JOIN orders AS o ON o.customer_id = c.id AND o.created_at >= '2024-01-01'\n"
    "WHERE c.country IN ('DE', 'FR', 'NL')\n"
    "GROUP BY c.name\n"
    "HAVING SUM(o.total) > 1000\n"
    "ORDER BY revenue DESC\n"
    "LIMIT 20;\n"
    "-- customers without orders this year have no revenue and are therefore left out by the HAVING clause;\n"
    "-- to keep them, use COALESCE(SUM(o.total), 0) >= 0 instead",
    "function debounce(callback, delay) {\n"
    "  let timer = null;\n"
    "  return function (...args) {\n"
    "    clearTimeout(timer);\n"
    "    timer = setTimeout(() => {\n"
    "      timer = null;\n"
    "      callback.apply(this, args);\n"
    "    }, delay);\n"
    "  };\n"
    "}\n"
    "\n"
    "const input = document.querySelector('#search');\n"
    "input.addEventListener('input', debounce((event) => {\n"
    "  fetch(`/api/search?q=${encodeURIComponent(event.target.value)}`)\n"
    "    .then((response) => response.json())\n"
    "    .then(showResults);\n"
    "}, 250));\n",
    "#include <stdio.h>\n"
    "#include <stdlib.h>\n"
    "\n"
    "/* Count the lines of a file given on the command line. */\n"
    "int main(int argc, char **argv) {\n"
    "    if (argc != 2) {\n"
    '        fprintf(stderr, "usage: %s FILE\\n", argv[0]);\n'
    "        return EXIT_FAILURE;\n"
    "    }\n"
    '    FILE *file = fopen(argv[1], "r");\n'
    "    if (!file) { perror(argv[1]); return EXIT_FAILURE; }\n"
    "    long lines = 0;\n"
    "    for (int c; (c = fgetc(file)) != EOF;) if (c == '\\n') lines++;\n"
    '    printf("%ld\\n", lines);\n'
    "    fclose(file);\n"
    "    return EXIT_SUCCESS;\n"
    "}\n",
    '{"order": {"id": 40217, "placed": "2024-06-11T09:30:00Z", "customer": {"name": "A. Moreau", "city": "Lyon"}, '
    '"items": [{"sku": "LMP-03", "title": "Desk lamp, brass", "quantity": 1, "price": 64.9}, {"sku": "BLB-11", '
    '"title": "LED bulb, warm white", "quantity": 4, "price": 3.75}, {"sku": "CBL-07", "title": "Extension cable, 3 '
    'm", "quantity": 2, "price": 8.2}], "shipping": {"method": "parcel", "cost": 4.9, "tracking": null}, "status": '
    '"packed", "total": 101.2}}',
    "| City | Country | Population (millions) | Metro lines | Opened |\n"
    "| --- | --- | --- | --- | --- |\n"
    "| Berlin | Germany | 3.7 | 9 | 1902 |\n"
    "| Lisbon | Portugal | 0.5 | 4 | 1959 |\n"
    "| Madrid | Spain | 3.3 | 13 | 1919 |\n"
    "| Oslo | Norway | 0.7 | 5 | 1966 |\n"
    "| Vienna | Austria | 2.0 | 5 | 1976 |\n"
    "\n"
    "The table lists five European capitals with a metro. Berlin has the oldest network of the five, and Madrid has "
    "the most lines.",
    # mathematics and argument
    "Suppose that the square root of two were a fraction, say a divided by b, with no common factor. Then a squared "
    "equals twice b squared, so a squared is even, and therefore a itself is even. Write a as twice some integer c. "
    "Substituting gives four c squared equals two b squared, or b squared equals two c squared, so b is even as "
    "well. But then a and b have the common factor two, which we excluded at the beginning. The assumption leads to "
    "a contradiction, and hence the square root of two is not a fraction.",
    "It is tempting to judge a decision by its outcome. A friend drives home after three glasses of wine and "
    "arrives safely; another takes a taxi that is hit by a truck. Nobody would say that the first chose well and "
    "the second badly, yet we reason like this about investments, medical treatments and football coaches all the "
    "time. A better question is what could have been known beforehand, and what the odds were. That question is "
    "harder to answer. It needs records of what people believed at the time, and hardly anybody keeps them.",
    # other languages
    "Der Zug hielt auf offener Strecke, und niemand wusste, warum. Zuerst blieb es still im Abteil. Dann begann "
    "eine alte Dame, Äpfel zu verteilen, und nach einer halben Stunde kannten sich alle beim Vornamen. Draußen lag "
    "Nebel über den Feldern, man sah gerade noch die Pappeln am Bach. Ein Junge fragte, ob die Welt hinter dem "
    "Nebel noch da sei. Der Schaffner, der in diesem Augenblick die Tür öffnete, sagte: bis Göttingen auf jeden "
    "Fall, danach könne er für nichts garantieren.",
    "Le boulanger de la rue des Lilas se lève à deux heures du matin, été comme hiver. Il allume le four, pèse la "
    "farine et prépare la pâte que son apprenti façonnera plus tard. À six heures, les premiers clients attendent "
    "déjà devant la porte: un chauffeur de bus, deux infirmières, un étudiant qui ne s'est pas encore couché. Il "
    "connaît leurs habitudes et leur tend le pain avant qu'ils ne parlent. Quand on lui demande pourquoi il n'a "
    "jamais voulu agrandir son magasin, il répond qu'il aurait alors moins de temps pour ses clients.",
    "La biblioteca del pueblo cabe en una sola habitación, pero tiene una regla que la hace distinta de todas las "
    "demás: quien devuelve un libro debe contar, en tres frases, por qué vale la pena leerlo o por qué no. La "
    "bibliotecaria apunta las frases en una tarjeta y la deja dentro de la cubierta. Con los años, algunas tarjetas "
    "se han vuelto más interesantes que los propios libros. En una novela muy larga alguien escribió: el mar "
    "aparece en la última página, y merece la pena esperar.",
    "Il vecchio ponte di pietra attraversa il torrente in un punto dove la valle si stringe. I pastori lo usavano "
    "due volte all'anno, in maggio per salire agli alpeggi e alla fine di settembre per tornare. Oggi la strada "
    "passa più in basso, e sul ponte si incontrano soltanto escursionisti e qualche capra. D'inverno il ghiaccio "
    "copre i gradini e il comune chiude il sentiero con una catena. Eppure, ogni primavera, qualcuno pulisce le "
    "pietre e rimette a posto quelle che la neve ha spostato. Nessuno sa chi sia.",
    # open beginnings, as users write them
    "Write a short story about a gardener who discovers that one of her roses can predict the weather. The story "
    "should have a clear beginning, a surprise in the middle and a quiet ending, and it should not be longer than "
    "three paragraphs. Use simple language, so that it can be read aloud to children. Here is the story. Once upon "
    "a time, in a village between two rivers, there lived a gardener named Ilse who grew more than forty kinds of "
    "roses. She knew each of them by its scent, and on summer evenings she walked along the beds with her eyes "
    "closed.",
    "I have a phone interview for a position as a junior data analyst next week, and I am rather nervous. The "
    "company sells bicycles online. I know spreadsheets well and some Python, but I have never worked with a large "
    "database. Please give me a list of questions that I should expect, together with short notes on how to answer "
    "them honestly. Of course. Here are the questions that come up most often in such interviews, in the order in "
    "which they are usually asked. 1. Tell us about a data set that you worked with recently, and about what you "
    "learned from it.",
)
