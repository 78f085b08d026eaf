"""Text: from corpora and files to token files, and back from ids to text.

corpora, sources    what can be read: corpora by name, and files and folders
readers             the documents in one file of any kind
documents           which documents are kept, and in which split each one is
tokenizers          text to ids and back
parallel            documents to ids in several processes
token_writer        writes token files and meta.json
token_files         reads them
foreign             token files of nanoGPT and llm.c
packages            text and vocabularies that registry packages carry
summary             what a preparation prints at its end
"""
